"""Small data for the tests of this folder."""

import json
from pathlib import Path

import numpy as np

from ringjax.data.example import Example


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def captioned(count: int, codes_per_frame: int = 4, vision_codes: int = 100, seed: int = 0) -> list[dict]:
    """Lines of one to four frames with captions of different lengths; no two alike."""
    rng = np.random.default_rng(seed)
    return [
        {
            "fields": ["[vision],caption", "[caption],vision"],
            "vision": rng.integers(0, vision_codes, codes_per_frame * int(rng.integers(1, 5))).tolist(),
            "caption": f"number {i} " + "so " * int(rng.integers(0, 12)),
        }
        for i in range(count)
    ]


def unique_example(number: int, length: int, loss: np.ndarray | None = None) -> Example:
    """An example whose tokens occur in no other: pairs can be counted."""
    tokens = (number * 10_000 + np.arange(length)).astype(np.int32)
    loss = np.ones(length, bool) if loss is None else loss
    return Example(tokens, np.zeros(length, bool), loss)


def same_batches(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
