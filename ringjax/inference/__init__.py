"""Generation: sampling, prompts of different lengths, the compiled loops, and models that can be asked.

sampling       from logits to a token: repetition penalty, temperature, top-k, top-p, min-p, guidance
prompts        prompts of different lengths as one batch; run_prompts and lwm_prompts: in which words
room           whether a cache fits, before it is allocated
prefill        how a generation begins
generate       text or pictures after prompts, on any mesh
grammar        which ids may come next where text and pictures mix; pieces: what people want of such a stream
interleaved    the loop in which the model itself opens and ends vision
session        one conversation whose cache stays; streaming: its text, as it comes
trained        a run that continues text, sees, draws and writes both; lwm_stream: the same of LWM's weights
text_model     a published model that writes and talks
command        `ringjax generate`; chat_command: `ringjax chat`
"""

from ringjax.inference.generate import generate_frames, generate_text
from ringjax.inference.interleaved import generate_interleaved
from ringjax.inference.pieces import Frames, Text
from ringjax.inference.prompts import append_text, append_vision, text_prompt
from ringjax.inference.sampling import Sampling

__all__ = [
    "Frames",
    "Sampling",
    "Text",
    "append_text",
    "append_vision",
    "generate_frames",
    "generate_interleaved",
    "generate_text",
    "text_prompt",
]
