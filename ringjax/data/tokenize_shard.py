"""One shard of `ringjax tokenize`: from lines to a file of records. Runs in a worker process, or in the caller's."""

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ringjax.data.errors import DataError
from ringjax.data.example import Example, require_usable
from ringjax.data.fields import FieldEncoder, Spec
from ringjax.data.jsonl import parse_line
from ringjax.data.pictures import Fit, read_frames
from ringjax.data.records import Shard, encode_record, write_shard
from ringjax.data.tokenizers import load_tokenizer

# Frames that go through the image tokenizer at once: one compiled shape, and a bound on memory.
FRAMES_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Line:
    """Where one line lies: bytes `start … stop − 1` of a file; a whole text file has `line_index` None."""

    path: str
    start: int
    stop: int
    line_index: int | None

    @property
    def place(self) -> str:
        return self.path if self.line_index is None else f"{self.path} line {self.line_index + 1}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What every worker needs to know."""

    folder: str
    fields: Spec | None
    tokenizer: str
    vision_tokenizer: str | None
    codes_per_frame: int
    vision_codes: int
    max_frames: int | None
    separator: str
    add_bos: bool
    add_eos: bool
    picture_key: str
    fit: Fit
    background: str
    skip_errors: bool


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """A written shard (None: every line was skipped), its counts, and what was wrong with skipped lines."""

    shard: Shard | None
    tokens: int
    vision_tokens: int
    longest: int
    skipped: tuple[str, ...]


class ShardWriter:
    """Tokenizes lines; holds the tokenizers, so that a worker loads them once."""

    def __init__(self, recipe: Recipe, threads: int = 1):
        self._recipe, self._threads = recipe, threads
        self._encoder = FieldEncoder(
            load_tokenizer(recipe.tokenizer),
            codes_per_frame=recipe.codes_per_frame,
            vision_codes=recipe.vision_codes,
            max_frames=recipe.max_frames,
            separator=recipe.separator,
            add_bos=recipe.add_bos,
            add_eos=recipe.add_eos,
        )
        self._vision = None if recipe.vision_tokenizer is None else PictureEncoder(recipe.vision_tokenizer)

    def write(self, number: int, lines: tuple[Line, ...]) -> ShardResult:
        """Write shard `number`.

        Raises:
            DataError: a line cannot be used and errors are not skipped.
        """
        skipped: list[str] = []
        examples = list(self._examples(lines, skipped))
        shard = None
        if examples:
            path = Path(self._recipe.folder) / f"{number:05d}.array_record"
            shard = write_shard(path, map(encode_record, examples))
        return ShardResult(
            shard,
            tokens=sum(map(len, examples)),
            vision_tokens=sum(int(example.modality.sum()) for example in examples),
            longest=max(map(len, examples), default=0),
            skipped=tuple(skipped),
        )

    def _examples(self, lines: tuple[Line, ...], skipped: list[str]) -> Iterator[Example]:
        group = FRAMES_AT_ONCE if self._vision else len(lines)
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(lines), group):
                some = lines[start : start + group]
                for line, row in zip(some, self._with_codes(list(pool.map(self._row, some))), strict=True):
                    try:
                        yield self._example(line, row)
                    except DataError as error:
                        if not self._recipe.skip_errors:
                            raise
                        skipped.append(str(error))

    def _row(self, line: Line) -> dict | DataError:
        """The line's object, with `vision` as uint8 frames where it names a picture; or what is wrong with it."""
        recipe = self._recipe
        try:
            with open(line.path, "rb") as file:
                file.seek(line.start)
                raw = file.read(line.stop - line.start)
            if line.line_index is None:
                return {"fields": "text", "text": _decode(raw, line.place)}
            row = parse_line(raw, line.place)
            if self._vision is None or recipe.picture_key not in row:
                return row
            return row | {"vision": self._frames(row, line)}
        except DataError as error:
            return error

    def _frames(self, row: dict, line: Line) -> np.ndarray:
        recipe, name = self._recipe, row[self._recipe.picture_key]
        if not isinstance(name, str) or not name:
            raise DataError(f"{line.place}: field {recipe.picture_key!r} must name a picture, not {name!r}")
        if "vision" in row:
            raise DataError(f"{line.place}: both {recipe.picture_key!r} and 'vision' are given; leave one out")
        try:
            return read_frames(
                Path(line.path).parent / name,
                self._vision.resolution,
                channels=self._vision.channels,
                fit=recipe.fit,
                background=recipe.background,
                max_frames=recipe.max_frames,
            )
        except DataError as error:
            raise DataError(f"{line.place}: {error}") from None

    def _with_codes(self, rows: list) -> list:
        """The rows with frames replaced by their codes, all frames of the group encoded together."""
        seen = [i for i, row in enumerate(rows) if isinstance(row, dict) and _is_frames(row.get("vision"))]
        if not seen:
            return rows
        # By size: with fit "centre" pictures keep theirs.
        for size in sorted({rows[i]["vision"].shape[1:] for i in seen}):
            alike = [i for i in seen if _is_frames(rows[i]["vision"]) and rows[i]["vision"].shape[1:] == size]
            codes = self._vision.encode(np.concatenate([rows[i]["vision"] for i in alike]))
            stops = np.cumsum([len(rows[i]["vision"]) for i in alike])
            for i, grids in zip(alike, np.split(codes, stops[:-1]), strict=True):
                rows[i] = rows[i] | {"vision": grids.reshape(-1)}
        return rows

    def _example(self, line: Line, row: dict | DataError) -> Example:
        if isinstance(row, DataError):
            raise row
        return require_usable(
            self._encoder.encode_line(row, self._recipe.fields, line.line_index or 0, line.place), line.place
        )


class PictureEncoder:
    """Frames to codes, in batches of one shape."""

    def __init__(self, path: str):
        from ringjax.models import vqgan

        self._model = vqgan.load_vqgan(vision_tokenizer_path(path))
        self.config = self._model.config
        self.resolution, self.channels = self.config.resolution, self.config.channels
        self.fingerprint = vqgan.vqgan_fingerprint(self._model)
        self._encode = vqgan.encode_pictures

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """`[n, h, w]` codes of `[n, H, W]` or `[n, H, W, 3]` uint8 frames."""
        filled = np.resize(frames, (-len(frames) % FRAMES_AT_ONCE + len(frames), *frames.shape[1:]))
        return self._encode(self._model, filled, batch_size=FRAMES_AT_ONCE)[: len(frames)]


def vision_tokenizer_path(name: str) -> Any:
    """The file of an image tokenizer; `sample` is the digits' own."""
    from ringjax.data import samples

    return samples.path("digits_vqgan.safetensors") if name == "sample" else name


def _is_frames(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


_writer: ShardWriter | None = None


def start_worker(recipe: Recipe) -> None:
    """Set up a worker process: one plain CPU device, whatever the parent process has."""
    global _writer
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if "host_platform_device_count" not in flag)
    if recipe.vision_tokenizer is not None:
        import jax

        # Importing a main module may have read the environment already; no backend is up yet.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1)
    _writer = ShardWriter(recipe)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits on a queue that it holds open itself, so it would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(number: int, lines: tuple[Line, ...]) -> ShardResult:
    """Write one shard in a worker process."""
    return _writer.write(number, lines)
