"""Sample data that travels with the package, so that nothing is downloaded to get started.

    digits   5,000 handwritten digits, 28 × 28 grey, 4,500 to train on and 500 held out
    prose    three novels to train on, a fourth held out
    prose_tokenizer.json        byte-level BPE, 512 ids, learned on the training novels and the captions
    digits_vqgan.safetensors    an image tokenizer for the digits: 16 codes a picture

`README.md` beside this file says where everything comes from and how to make it again; `manifest.json` records the
size and SHA-256 of each file, and `licenses/` holds the notices that go with any copy.
"""

import gzip
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

Split = Literal["train", "heldout"]

FOLDER = Path(__file__).parent
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOVELS: dict[str, tuple[str, ...]] = {
    "train": ("pride_and_prejudice", "sense_and_sensibility", "emma"),
    "heldout": ("northanger_abbey",),
}
# Of ten pictures of a digit in the order of the source, the last is held out.
HELDOUT_EVERY = 10


class Digits(NamedTuple):
    """Pictures (0 background, 255 ink) and what they show."""

    images: UInt8[np.ndarray, "n 28 28"]
    labels: UInt8[np.ndarray, "n"]


def digits(split: Split = "train") -> Digits:
    """The handwritten digits of a split, the labels running 0, 1, … 9, 0, 1, … so that every prefix is balanced.

    The source has 500 pictures of each digit; the tenth, twentieth, … of each are held out (500 in all), the other
    4,500 train.

    Raises:
        ValueError: the split is neither "train" nor "heldout".
    """
    _check_split(split)
    with np.load(path("digits.npz"), allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    rank = np.empty(len(labels), np.int64)  # how many pictures of the same digit come before this one
    for digit in range(10):
        rank[labels == digit] = np.arange(np.sum(labels == digit))
    held_out = rank % HELDOUT_EVERY == HELDOUT_EVERY - 1
    chosen = np.flatnonzero(held_out if split == "heldout" else ~held_out)
    chosen = chosen[np.lexsort((labels[chosen], rank[chosen]))]
    return Digits(images[chosen], labels[chosen])


def digit_caption(label: int) -> str:
    """A digit in words: `digit_caption(7) == "seven"`."""
    if not 0 <= label <= 9:
        raise ValueError(f"label {label} is not a digit; give 0 to 9")
    return DIGIT_WORDS[int(label)]


def prose(split: Split = "train") -> list[str]:
    """Whole novels by Jane Austen, each one document of 430 to 880 thousand characters.

    A paragraph is one line, a blank line stands between paragraphs, and headings (`CHAPTER 1`) stand alone on a line.
    Train: Pride and Prejudice, Sense and Sensibility, Emma. Held out: Northanger Abbey.

    Raises:
        ValueError: the split is neither "train" nor "heldout".
    """
    _check_split(split)
    return [gzip.decompress(path(f"{name}.txt.gz").read_bytes()).decode("utf-8") for name in NOVELS[split]]


def prose_chapters(split: Split = "train") -> list[str]:
    """The chapters of `prose(split)`, each beginning with its heading; title pages are left out."""
    return list(_chapters(split))


@cache
def _chapters(split: Split) -> tuple[str, ...]:
    chapters = []
    for novel in prose(split):
        chapters += re.split(r"\n+(?=CHAPTER \d+\n)", novel)[1:]
    return tuple(re.sub(r"\s*\n+VOLUME \d+\s*$", "", chapter) for chapter in chapters)


@cache
def manifest() -> dict[str, dict]:
    """For each sample file its `bytes` and `sha256`, as recorded when it was made."""
    return json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))


def path(name: str) -> Path:
    """Where a sample file lies.

    Raises:
        ValueError: there is no sample of this name.
        FileNotFoundError: the package was installed without its data.
    """
    if name not in manifest():
        raise ValueError(f"no sample file {name!r}; there are {', '.join(sorted(manifest()))}")
    file = FOLDER / name
    if not file.is_file():
        raise FileNotFoundError(f"sample file {file} is missing; reinstall ringjax with its package data")
    return file


def damaged() -> list[str]:
    """Names of the sample files that are missing or not as recorded in the manifest; empty when all is well."""
    return [name for name, entry in manifest().items() if not _intact(FOLDER / name, entry)]


def _intact(file: Path, entry: dict) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]


def _check_split(split: str) -> None:
    if split not in NOVELS:
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'heldout'")
