"""What a trained model can do, in numbers next to bars.

bigram               a smoothed bigram model: what prose must beat
prose                the loss of a run on held-out prose
digits               captions of held-out digits, and drawings judged by a plain classifier
quickstart           `python -m ringjax.evaluation.quickstart RUN_DIR`: all of it, for the quickstart
quickstart_report    its samples.png and report.md
"""
