"""Pictures and frames of clips from captions.jsonl files as one long list of uint8 squares.

    {"file": "ant.webp", "caption": "ant"}        a picture is one row, a clip one row a frame

Decoded once into memory, or each time it is asked for.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ringjax.data.errors import DataError
from ringjax.data.heldout import Side, side_of
from ringjax.data.jsonl import JsonLines
from ringjax.data.pictures import Fit, count_frames, read_frame, read_frames
from ringjax.inside import inside

OnError = Literal["stop", "skip"]


class PictureForm(NamedTuple):
    """How a file becomes a square."""

    resolution: int
    channels: int
    fit: Fit
    background: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.resolution, self.resolution, self.channels)

    def frames(self, path: Path) -> UInt8[np.ndarray, "frames R R C"]:
        """All frames of a file; raises DataError."""
        resolution, channels, fit, background = self
        frames = read_frames(path, resolution, channels=channels, fit=fit, background=background)
        return frames.reshape(-1, *self.shape)

    def frame(self, path: Path, index: int) -> UInt8[np.ndarray, "R R C"]:
        """One frame of a file; raises DataError."""
        resolution, channels, fit, background = self
        frame = read_frame(path, index, resolution, channels=channels, fit=fit, background=background)
        return frame.reshape(self.shape)


class PictureFile(NamedTuple):
    """A file of a source, the line that names it, and its frames."""

    path: Path
    place: str
    frames: int


class LeftOut:
    """Files that could not be used: each once, with the reason; the first one raises where `on_error` is stop."""

    def __init__(self, on_error: OnError):
        self._stop = on_error == "stop"
        self.reasons: dict[str, str] = {}

    def add(self, place: str, path: str | Path, error: Exception) -> None:
        """Note a file, or a line that names none; raises DataError that names both where the run shall stop."""
        if self._stop:
            raise DataError(f"{place}: {error} (data.on_error skip leaves such files out and names them)") from None
        self.reasons.setdefault(str(path), " ".join(str(error).split()))

    def lines(self, most: int = 20) -> list[str]:
        """Count and names in words, at most `most` of them."""
        if not self.reasons:
            return []
        names = [f"  {reason}" for reason in list(self.reasons.values())[:most]]
        more = [f"  and {len(self.reasons) - most} more"] if len(self.reasons) > most else []
        return [f"{len(self.reasons)} picture(s) or clip(s) cannot be used and are left out:", *names, *more]


def list_files(path: str | Path, side: Side, heldout_share: float, left_out: LeftOut) -> list[PictureFile]:
    """The files of one side of a captions.jsonl, each with its number of frames.

    Raises:
        FileNotFoundError: there is no such captions.jsonl.
        DataError: a line has no `file`, or names one that cannot be used while `left_out` says stop.
    """
    rows, chosen = JsonLines(path), []
    for i in range(len(rows)):
        try:
            file, caption = _file_and_caption(rows, i, Path(path).parent)
        except DataError as error:
            left_out.add(rows.place(i), rows.place(i), error)
            continue
        if side_of(caption, heldout_share) == side:
            chosen.append((rows.place(i), file))
    counts = in_threads(lambda item: _count_or_error(item[1]), chosen)
    files = []
    for (place, file), count in zip(chosen, counts):
        if isinstance(count, DataError):
            left_out.add(place, file, count)
        else:
            files.append(PictureFile(file, place, count))
    return files


def _file_and_caption(rows: JsonLines, index: int, folder: Path) -> tuple[Path, str]:
    row = rows[index]
    file, caption = row.get("file"), row.get("caption")
    if not isinstance(file, str) or not file:
        raise DataError(f"{rows.place(index)} has no text in 'file'; name the picture or clip, relative to the folder")
    try:
        path = inside(folder, file)
    except ValueError as error:
        raise DataError(f"{rows.place(index)}: file {error}") from None
    return path, caption if isinstance(caption, str) and caption.strip() else file


def _count_or_error(file: Path) -> int | DataError:
    try:
        return count_frames(file)
    except DataError as error:
        return error


def in_threads(function: Callable, items: Sequence) -> list:
    """`function` of every item, in order; Pillow decodes outside Python's lock."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 4)) as pool:
        return list(pool.map(function, items))


class PictureSet:
    """Rows of one source; `set[indices]` gives `[n, R, R, C]` uint8."""

    files: list[PictureFile]

    def __init__(self, files: Iterable[PictureFile], form: PictureForm, left_out: LeftOut):
        self.files, self.form, self._left_out = list(files), form, left_out
        self._index()

    def _index(self) -> None:
        self._ends = np.cumsum([file.frames for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.files else 0

    def where(self, row: int) -> tuple[PictureFile, int]:
        """The file of a row, and which of its frames it is."""
        at = int(np.searchsorted(self._ends, row, side="right"))
        file = self.files[at]
        return file, int(row - (self._ends[at] - file.frames))

    @property
    def fingerprint(self) -> str:
        """Changes with the files, their order and their frames."""
        text = "\n".join(f"{file.path.name} {file.frames}" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __getitem__(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n R R C"]:
        return np.stack(in_threads(self._read, [int(row) for row in rows]))

    def _read(self, row: int) -> np.ndarray:
        """The row, or the next one that can be read."""
        for step in range(len(self)):
            file, frame = self.where((row + step) % len(self))
            try:
                return self.form.frame(file.path, frame)
            except DataError as error:
                self._left_out.add(file.place, file.path, error)
        raise DataError(f"none of {len(self.files)} pictures can be read; the first: {self.files[0].path}")


class DecodedSet(PictureSet):
    """The same, decoded once: files that cannot be decoded have no rows."""

    def _index(self) -> None:
        super()._index()
        self._pictures = np.empty((len(self), *self.form.shape), np.uint8)
        good = in_threads(self._decode, range(len(self.files)))
        if all(good):
            return
        self._pictures = self._pictures[np.repeat(good, [file.frames for file in self.files])]
        self.files = [file for file, is_good in zip(self.files, good) if is_good]
        super()._index()

    def _decode(self, index: int) -> bool:
        """Fill in the frames of a file; whether they could be read."""
        file, end = self.files[index], self._ends[index]
        try:
            self._pictures[end - file.frames : end] = self.form.frames(file.path)
        except DataError as error:
            self._left_out.add(file.place, file.path, error)
            return False
        return True

    def __getitem__(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n R R C"]:
        return self._pictures[np.asarray(rows, np.int64)]
