"""results.jsonl: what was asked in the first line, then one line an answer, so that an evaluation can go on.

{"format": 1, "asked": {…}, "about": {…}}                   `asked` decides the answers: going on needs the same
{"method": "exact", "part": "needle", "length": 1024, …}    appended and flushed whole
"""

import json
import os
from pathlib import Path
from typing import Any, Self, TextIO

from ringjax.training import distributed

FORMAT, NAME = 1, "results.jsonl"
_BEGINNING = b'{"format": 1, "asked": {'
KEY = ("method", "part", "length", "depth", "index")


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
            header = json.loads(line)
            found = header["asked"] if header["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} is no results file of this version; give another --output, or remove it")
        names = sorted({*found, *self.asked})
        other = next((name for name in names if found.get(name) != self.asked.get(name)), None)
        if other is not None:
            raise ValueError(
                f"{self.path} is of another evaluation: {other} is {found.get(other)!r} there and"
                f" {self.asked.get(other)!r} here; give another --output, or remove it"
            )


def _read(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        _key(record)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{where} is damaged; remove that line and run again: what it held is asked anew") from None
    return record


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record[name] for name in KEY)
