"""Folders of small pictures and clips with their captions.jsonl, for tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def drawn(index: int, size: int = 24) -> Image.Image:
    """A coloured rectangle on white, another one for each index."""
    rng = np.random.default_rng(index)
    pixels = np.full((size, size, 3), 255, np.uint8)
    (top, left), (height, width) = rng.integers(0, size // 2, 2), rng.integers(size // 4, size // 2, 2)
    pixels[top : top + height, left : left + width] = rng.integers(0, 200, 3)
    return Image.fromarray(pixels)


def write_captions(folder: Path, rows: list[dict]) -> Path:
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def picture_folder(folder: Path, count: int, first: int = 0, size: int = 24) -> Path:
    """`count` PNGs; returns their captions.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        drawn(i, size).save(folder / f"{i}.png")
    rows = [{"file": f"{i}.png", "caption": f"thing {i}"} for i in range(first, first + count)]
    return write_captions(folder, rows)


def save_clip(path: Path, frames: int, first: int = 0, size: int = 24) -> None:
    pictures = [drawn(first + i, size) for i in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True, duration=100)
