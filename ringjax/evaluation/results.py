"""results.jsonl: what was asked in the first line, then one line an answer, so that an evaluation can go on.

{"format": 1, "asked": {…}, "about": {…}}                   `asked` decides the answers: going on needs the same
{"method": "exact", "part": "needle", "length": 1024, …}    appended and flushed whole
"""

import json
import os
from pathlib import Path
from typing import Any, Self, TextIO

from ringjax.json_text import brief, parse_json
from ringjax.training import distributed

FORMAT, NAME = 1, "results.jsonl"
_BEGINNING = b'{"format": 1, "asked": {'
KEY = ("method", "part", "length", "depth", "index")
_LARGEST = 1e300  # so that sums of them are finite
_TEXTS, _COUNTS = ("method", "part"), ("length", "index")
_NUMBERS = ("depth", "score", "tokens", "seconds", "first_seconds", "cache_bytes", "peak_bytes", "characters", "bytes")


class Results:
    """The records of an evaluation; those of an earlier run of the same one are there already.

    Of several processes the first reads and writes the file; all of them know the records. A last line that was cut
    (a kill, a full disk) is dropped, and what it held is asked again. Raises ValueError for a file of another
    evaluation, or one that is damaged elsewhere.
    """

    def __init__(self, folder: str | Path, asked: dict[str, Any], about: dict[str, Any]):
        self.path = Path(folder) / NAME
        self.asked = json.loads(json.dumps(asked))  # tuples are lists once they were written
        self.records: list[dict[str, Any]] = []
        self.dropped = False
        self._file: TextIO | None = None
        self.records, self.dropped = distributed.same_on_all(lambda: self._open(about))
        self._done = {_key(record) for record in self.records}

    def _open(self, about: dict[str, Any]) -> list:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            self._go_on()
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed when the evaluation ends
        if self._file.tell() == 0:
            self._write({"format": FORMAT, "asked": self.asked, "about": about})
        return [self.records, self.dropped]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def has(self, method: str, cell: tuple) -> bool:
        """Whether this was answered."""
        return (method, *cell) in self._done

    def add(self, record: dict[str, Any]) -> None:
        """Writes an answer down before the next question is asked."""
        self._write(record)
        self.records.append(record)
        self._done.add(_key(record))

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()

    def _go_on(self) -> None:
        whole, end, last = self.path.read_bytes().rpartition(b"\n")
        if not end and last.startswith(_BEGINNING[: len(last)]):  # not even the first line was finished
            os.truncate(self.path, 0)
            return
        header, *lines = whole.decode("utf-8", errors="replace").split("\n")
        self._check_header(header)
        for number, line in enumerate(lines, 2):
            self.records.append(_read(line, f"{self.path} line {number}"))
        if last:
            os.truncate(self.path, len(whole) + 1)
            self.dropped = True

    def _check_header(self, line: str) -> None:
        try:
            header = parse_json(line)
            found = header["asked"] if header["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} is no results file of this version; give another --output, or remove it")
        names = sorted({*found, *self.asked})
        other = next((name for name in names if found.get(name) != self.asked.get(name)), None)
        if other is not None:
            raise ValueError(
                f"{self.path} is of another evaluation: {other[:100]} is {brief(found.get(other))} there and"
                f" {brief(self.asked.get(other))} here; give another --output, or remove it"
            )


def _read(line: str, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
        sound = isinstance(record, dict) and _is_sound(record)
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(f"{where} is damaged; remove that line and run again: what it held is asked anew") from None
    return record


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether what tables are made of is there, and of the kinds that they take."""
    texts, counts = ([record.get(name) for name in names] for names in (_TEXTS, _COUNTS))
    if not all(isinstance(x, str) for x in texts) or not all(type(x) is int and abs(x) < 2**53 for x in counts):
        return False
    if "depth" not in record or not all(record.get(name) is None or _is_number(record[name]) for name in _NUMBERS):
        return False
    if not _is_number(record.get("seconds")):
        return False
    if record["part"] != "perplexity":
        return "losses" not in record and _is_number(record.get("score"))
    losses, counts = record.get("losses"), record.get("counts")
    if not isinstance(losses, list) or not isinstance(counts, list) or len(losses) != len(counts):
        return False
    return all(map(_is_number, (*losses, *counts))) and sum(counts) > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record[name] for name in KEY)
