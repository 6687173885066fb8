"""What a trained model can do, in numbers next to bars; whether a model reads its context, sees and draws.

bigram               a smoothed bigram model: what prose must beat
prose                the loss of a run on held-out prose
digits               captions of held-out digits, and drawings judged by a plain classifier
quickstart           `python -m ringjax.evaluation.quickstart RUN_DIR`: all of it, for the quickstart
quickstart_report    its samples.png and report.md

haystack, question   the text, and a question about it in the form in which a model is asked
needle               LWM's needles
ruler                RULER's tasks: `ruler_tracing`, `ruler_lists`, `ruler_qa`, `words`
perplexity           the loss by position
reading, retrieval   how a model answers: from the whole context, or from the chunks that an index finds
rope_change, methods RoPE stretched without training; the methods by name
run_questions        the loop; `results` is what it writes, `summary`, `pictures`, `eval_report` what people look at
likelihood           several answers to one prompt, which is read once
heldout, choices     held-out pictures with captions; one caption among ten
captions, drawings   what is seen, and what is drawn; `gallery` for people, `video_needle` in long videos
vision_command       runs them; `vision_config` has their options, `choice_report` their table
eval_command         `ringjax eval`; `eval_config` has its options, `eval_progress` its bar
"""
