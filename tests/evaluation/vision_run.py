"""A run that has learned twelve captions by heart, both ways: what an evaluation must find perfect."""

import functools
import json
import tempfile
from pathlib import Path

from ringjax.training.load import parse_config
from ringjax.training.loop import train

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "a hill", "a red house")
CODES = 16
CONFIG = """
model: {width: 48, ffn_width: 96, layers: 2, heads: 2, vocab_size: 512, vision_codes: 16, vision_vocab_size: 18,
        dtype: float32}
data: {sources: [{path: "DATA"}], codes_per_frame: 4,
       vision_codes: 16, prefetch: 0}
training: {steps: 150, seq_len: 64, batch_size: 8}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 20}
mesh: {shape: "8,1,1,1"}
logging: {progress: none, plot: false}
"""


def codes(number: int, frames: int = 1) -> list[int]:
    """A picture of what WORDS[number] says: every caption has its own; a clip is the same in every frame."""
    return [number, (number + 1) % CODES, number, (number + 2) % CODES] * frames


def write_lines(path: Path, numbers, frames: int = 1) -> Path:
    """A .jsonl of codes and captions."""
    rows = [{"caption": WORDS[i], "vision": codes(i, frames)} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@functools.cache
def learned_run() -> Path:
    """The folder of the run, made once for all tests."""
    folder = Path(tempfile.mkdtemp(prefix="ringjax-test-"))
    both = "[vision],caption", "[caption],vision"
    rows = [
        {"fields": fields, "caption": WORDS[i], "vision": codes(i, frames)}
        for i in range(12)
        for frames in (1, 3)
        for fields in both
    ]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.replace("DATA", str(data))
    return train(parse_config(text, overrides=[("run_dir", str(folder / "run"))]))
