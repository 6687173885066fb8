"""A run of two steps over the samples, for tests of what is done with a run afterwards."""

import functools
import tempfile
from pathlib import Path

from ringjax.training.load import parse_config
from ringjax.training.loop import train

CONFIG = """
model: {width: 16, ffn_width: 16, layers: 1, heads: 2, vocab_size: 512, vision_codes: 64, vision_vocab_size: 66,
        dtype: float32}
data: {sources: [{path: "sample:digits", weight: 1}, {path: "sample:prose", weight: 1}], codes_per_frame: 16,
       vision_codes: 64, prefetch: 0}
training: {steps: 2, seq_len: 64, batch_size: 2}
mesh: {shape: "1,1,1,8"}
logging: {progress: none}
"""


@functools.cache
def tiny_run() -> Path:
    """The folder of the run, made once for all tests."""
    folder = Path(tempfile.mkdtemp(prefix="ringjax-test-"))
    return train(parse_config(CONFIG, overrides=[("run_dir", str(folder / "run"))]))
