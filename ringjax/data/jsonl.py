"""Random access to the lines of a jsonl file, and their faults told by line number."""

import functools
import hashlib
import json
import mmap
from pathlib import Path

import numpy as np

from ringjax.data.errors import DataError
from ringjax.json_text import parse_json

_CHUNK = 1 << 24


class JsonLines:
    """The lines of a jsonl file that are not blank, in order; `rows[i]` parses one.

    Only the places of the lines are kept in memory (8 bytes a line). Use it from any number of threads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no line, or is compressed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist")
        if self.path.suffix in (".gz", ".zst", ".xz", ".bz2"):
            raise ValueError(f"{path} is compressed, and its lines cannot be read in any order; unpack it first")
        if self.path.stat().st_size == 0:
            raise ValueError(f"data file {path} is empty")
        status = self.path.stat()
        starts, self.fingerprint = _scan(self.path, status.st_size, status.st_mtime_ns)
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._stops = np.append(starts[1:], len(self._bytes))
        self._starts = starts
        self.line_index = self._lines_with_text()
        """Of each row, its line in the file, counted from 0, blank lines included."""

    def _lines_with_text(self) -> np.ndarray:
        short = np.flatnonzero(self._stops - self._starts <= 80)
        blank = [i for i in short if not self._bytes[self._starts[i] : self._stops[i]].strip()]
        if len(blank) == len(self._starts):
            raise ValueError(f"data file {self.path} has blank lines only")
        return np.delete(np.arange(len(self._starts)), blank)

    def __len__(self) -> int:
        return len(self.line_index)

    def place(self, row: int) -> str:
        """How an error names a row: file and line, counted from 1 as editors do."""
        return f"{self.path} line {self.line_index[row] + 1}"

    def span(self, row: int) -> tuple[int, int]:
        """Where a row begins and ends in the file, in bytes."""
        line = self.line_index[row]
        return int(self._starts[line]), int(self._stops[line])

    def __getitem__(self, row: int) -> dict:
        """The JSON object of a row. Raises DataError where it is garbled, cut, or no object."""
        start, stop = self.span(row)
        return parse_line(self._bytes[start:stop], self.place(row))


def parse_line(raw: bytes, place: str) -> dict:
    """The JSON object in `raw`. Raises DataError, which begins with `place`, where there is none."""
    try:
        value = parse_json(raw)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise DataError(f"{place}: not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: a line must be a JSON object {{…}}, not a {type(value).__name__}")
    return value


@functools.lru_cache(maxsize=16)
def _scan(path: Path, size: int, mtime_ns: int) -> tuple[np.ndarray, str]:
    """Where each line starts, and a digest of the whole file; `size` and `mtime_ns` are for the cache only."""
    starts, digest, at, newline = [np.zeros(1, np.int64)], hashlib.sha256(), 0, ord("\n")
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == newline) + at + 1)
            at += len(chunk)
    starts = np.concatenate(starts)
    return starts[starts < at], digest.hexdigest()
