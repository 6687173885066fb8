"""Generation: sampling, prompts of different lengths, the compiled loop, and trained runs.

sampling    from logits to a token: temperature, top-k, top-p, guidance
prompts     prompts of different lengths as one batch
generate    text and pictures after prompts, on any mesh
trained     a run folder that continues text, puts pictures into words and draws
command     `ringjax generate`
"""

from ringjax.inference.generate import generate_frames, generate_text
from ringjax.inference.prompts import append_text, text_prompt
from ringjax.inference.sampling import Sampling

__all__ = ["Sampling", "append_text", "generate_frames", "generate_text", "text_prompt"]
