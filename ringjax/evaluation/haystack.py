"""The text that needles are hidden in, and that perplexity is measured on: documents as token ids."""

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ringjax.data import samples
from ringjax.inference.vocabulary import Vocabulary
from ringjax.json_text import parse_json

SUFFIXES = (".txt", ".md", ".jsonl", ".gz")
MOST_TEXT = 1 << 28
"""Bytes of one unpacked `.gz`: a thousand times less can hold it, and a haystack of 1M tokens has 4 MB."""


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Documents one after the other. With `repeat` they begin anew at the end, as LWM's essays do."""

    documents: tuple[Int[np.ndarray, " n"], ...]
    repeat: bool = False

    @classmethod
    def of(cls, texts: Sequence[str], vocabulary: Vocabulary, repeat: bool = False) -> "Haystack":
        """Raises ValueError for texts without a token."""
        documents = tuple(np.asarray(vocabulary.encode(text), np.int32) for text in texts)
        if not any(len(ids) for ids in documents):
            raise ValueError("the haystack has no text")
        return cls(documents, repeat)

    @functools.cached_property
    def ids(self) -> Int[np.ndarray, " n"]:
        """The tokens of all documents."""
        return np.concatenate(self.documents)

    def excerpt(self, count: int, rng: np.random.Generator) -> list[int]:
        """So many tokens in a row from a place that `rng` says.

        Raises ValueError where there are fewer, and they are not to be repeated.
        """
        size = len(self.ids)
        if count > size and not self.repeat:
            raise ValueError(
                f"the haystack has {size} tokens and a prompt needs {count} of them; give a longer one with --haystack,"
                " or repeat it with --repeat_haystack true"
            )
        start = int(rng.integers(size if self.repeat else size - count + 1))
        return self.ids[(start + np.arange(count)) % size].tolist()


def read_texts(path: str | None) -> list[str]:
    """The documents of a file or of all files of a folder; None: the novels that travel with the package.

    A `.jsonl` holds one document a line as `text`, as LWM's haystack does; `.txt` and `.md` are one document each, and
    each may be compressed (`.gz`). Raises FileNotFoundError or ValueError, naming the file.
    """
    if path is None:
        return [*samples.prose("heldout"), *samples.prose("train")]
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"no haystack at {path}; give a text file, a .jsonl with 'text', or a folder of them")
    files = [source] if source.is_file() else sorted(f for f in source.iterdir() if f.suffix in SUFFIXES)
    texts = [text for file in files for text in _read(file)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path} holds no text; a haystack is a file, or a folder of files {', '.join(SUFFIXES)}")
    return texts


def text_fingerprint(texts: Sequence[str]) -> str:
    """A short name of these texts, in this order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def _read(file: Path) -> list[str]:
    data = file.read_bytes()
    name = file
    try:
        if file.suffix == ".gz":
            data, name = _unpacked(data), file.with_suffix("")
            if len(data) > MOST_TEXT:
                raise ValueError(f"{file} unpacks to more than {MOST_TEXT} bytes; cut it into several files")
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if name.suffix != ".jsonl":
        return [text]
    return [_text_of(line, f"{file} line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _unpacked(data: bytes) -> bytes:
    """No more than is taken, and one byte."""
    with gzip.open(io.BytesIO(data)) as packed:
        return packed.read(MOST_TEXT + 1)


def _text_of(line: str, where: str) -> str:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} has no 'text'")
    return text
