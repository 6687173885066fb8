"""One shard of `ringjax tokenize`: from lines to a file of records. Runs in a worker process, or in the caller's."""

import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ringjax.data.bundles import Bundle, JoinAs, Line, Part
from ringjax.data.codes import vision_tokenizer_path
from ringjax.data.errors import DataError
from ringjax.data.example import Example
from ringjax.data.fields import FieldEncoder, Spec
from ringjax.data.jsonl import parse_line
from ringjax.data.pictures import Fit, read_frames
from ringjax.data.records import Shard, encode_record, write_shard
from ringjax.data.tokenizers import load_tokenizer
from ringjax.data.variations import OVERSAMPLE, may_be_mirrored, number_of, vary
from ringjax.inside import inside

# Frames that go through the image tokenizer at once, one compiled shape; and lines whose pictures are in memory, beside
# as many that are being read.
AT_ONCE_ON_CPU, AT_ONCE = 32, 256


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
    caption_key: str
    fit: Fit
    background: str
    mirror: bool
    join_as: JoinAs
    caption_words: int
    truncate: bool
    skip_errors: bool


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """A written shard (None: every line was skipped), its counts, and what was wrong with skipped lines."""

    shard: Shard | None
    tokens: int
    vision_tokens: int
    longest: int
    skipped: tuple[str, ...]
    truncated: int = 0
    """Texts that were cut."""


class ShardWriter:
    """Tokenizes bundles of lines; holds the tokenizers, so that a worker loads them once."""

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

    def write(self, number: int, bundles: tuple[Bundle, ...]) -> ShardResult:
        """Write shard `number`.

        Raises:
            DataError: a line cannot be used and errors are not skipped.
        """
        told = Told()
        examples = list(self._examples(bundles, told))
        shard = None
        if examples:
            path = Path(self._recipe.folder) / f"{number:05d}.array_record"
            shard = write_shard(path, map(encode_record, examples))
        return ShardResult(
            shard,
            tokens=sum(map(len, examples)),
            vision_tokens=sum(int(example.modality.sum()) for example in examples),
            longest=max(map(len, examples), default=0),
            skipped=tuple(told.skipped),
            truncated=told.truncated,
        )

    def _examples(self, bundles: tuple[Bundle, ...], told: "Told") -> Iterator[Example]:
        with ThreadPoolExecutor(self._threads) as pool:
            groups = list(_groups(bundles, self._vision.at_once if self._vision else len(bundles)))
            # The next group is read from disk while this one is encoded.
            ahead = self._read(pool, groups[0])
            for number, group in enumerate(groups):
                rows = {part: row for future in ahead for part, row in future.result().items()}
                ahead = self._read(pool, groups[number + 1]) if number + 1 < len(groups) else []
                self._put_codes(rows)
                for bundle in group:
                    try:
                        example = self._example(bundle, rows, told)
                    except DataError as error:
                        if not self._recipe.skip_errors:
                            raise
                        told.skip(error)
                        continue
                    if example is not None:
                        yield example

    def _read(self, pool: ThreadPoolExecutor, group: Sequence[Bundle]) -> list[Future]:
        """The rows of all parts of a group, those of one line by one thread: its picture is decoded once."""
        by_line: dict[Line, dict[Part, None]] = {}
        for part in (part for bundle in group for part in bundle.parts):
            by_line.setdefault(part.line, {})[part] = None
        return [pool.submit(self._rows, tuple(parts)) for parts in by_line.values()]

    def _rows(self, parts: tuple[Part, ...]) -> dict[Part, dict | DataError]:
        """Of each part of one line its row; or what is wrong with it."""
        read = functools.cache(functools.partial(self._decoded, parts[0].line))
        return {part: self._row(part, read) for part in parts}

    def _row(self, part: Part, read: Callable[[str, int], np.ndarray]) -> dict | DataError:
        """The line's object, with `vision` as uint8 frames where it names a picture; or what is wrong with it."""
        recipe, line = self._recipe, part.line
        try:
            with open(line.path, "rb") as file:
                file.seek(line.start)
                raw = file.read(line.stop - line.start)
            if line.line_index is None:
                return {"fields": "text", "text": _decode(raw, line.place)}
            row = parse_line(raw, line.place)
            if self._vision is None or recipe.picture_key not in row:
                return row
            return row | {"vision": self._frames(row, part, read)}
        except DataError as error:
            return error

    def _frames(self, row: dict, part: Part, read: Callable[[str, int], np.ndarray]) -> np.ndarray:
        recipe, line, name = self._recipe, part.line, row[self._recipe.picture_key]
        if not isinstance(name, str) or not name:
            raise DataError(f"{line.place}: field {recipe.picture_key!r} must name a picture, not {name!r}")
        if "vision" in row:
            raise DataError(f"{line.place}: both {recipe.picture_key!r} and 'vision' are given; leave one out")
        frames = read(name, self._vision.resolution * (OVERSAMPLE if part.variant else 1))
        if not part.variant:
            return frames
        rng = np.random.default_rng(number_of(name, line.line_index, part.variant))
        mirror = recipe.mirror and may_be_mirrored(str(row.get(recipe.caption_key, "")))
        return vary(frames, rng, background=recipe.background, mirror=mirror)

    def _decoded(self, line: Line, name: str, resolution: int) -> np.ndarray:
        recipe = self._recipe
        options = dict(fit=recipe.fit, background=recipe.background, max_frames=recipe.max_frames)
        try:
            file = inside(Path(line.path).parent, name)
            return read_frames(file, resolution, channels=self._vision.channels, **options)
        except ValueError as error:
            raise DataError(f"{line.place}: {error}") from None

    def _put_codes(self, rows: dict[Part, dict | DataError]) -> None:
        """Put codes in place of frames, those of all rows encoded together."""
        seen = {part: row for part, row in rows.items() if isinstance(row, dict) and _is_frames(row.get("vision"))}
        # By size: with fit "centre" pictures keep theirs.
        for size in sorted({row["vision"].shape[1:] for row in seen.values()}):
            alike = {part: row["vision"] for part, row in seen.items() if row["vision"].shape[1:] == size}
            codes = self._vision.encode(np.concatenate(list(alike.values())))
            stops = np.cumsum([len(frames) for frames in alike.values()])
            for part, grids in zip(alike, np.split(codes, stops[:-1]), strict=True):
                rows[part] = rows[part] | {"vision": grids.reshape(-1)}

    def _example(self, bundle: Bundle, rows: dict[Part, dict | DataError], told: "Told") -> Example | None:
        """The example of a bundle. What is wrong with one of several joined lines leaves out that one."""
        if len(bundle.parts) == 1:
            part = bundle.parts[0]
            return self._encode(self._limited(part, rows[part], told), part, self._encoder)
        usable: list[tuple[Part, dict]] = []
        for part in bundle.parts:
            try:
                usable.append((part, self._limited(part, rows[part], told)))
            except DataError as error:
                if not self._recipe.skip_errors:
                    raise
                told.skip(error)
        if not usable or (bundle.needle is not None and len(usable) < len(bundle.parts)):
            return None
        if self._recipe.join_as == "turns":
            return self._turns(usable, told)
        place = f"{len(usable)} lines from {usable[0][0].line.place} on"
        row = as_video([row for _, row in usable], bundle.needle, place)
        return self._encode(row, usable[0][0], self._encoder, place)

    def _turns(self, usable: list[tuple[Part, dict]], told: "Told") -> Example | None:
        bare = dataclasses.replace(self._encoder, add_bos=False, add_eos=False)
        found: list[Example] = []
        for part, row in usable:
            try:
                found.append(self._encode(row, part, bare))
            except DataError as error:
                if not self._recipe.skip_errors:
                    raise
                told.skip(error)
        return self._encoder.enclosed(found) if found else None

    def _encode(self, row: dict, part: Part, encoder: FieldEncoder, place: str | None = None) -> Example:
        return encoder.encode_line(row, self._recipe.fields, part.choose, place or part.line.place)

    def _limited(self, part: Part, row: dict | DataError, told: "Told") -> dict:
        """The row, with texts beside a picture that are not too long; raises what was wrong with the line."""
        if isinstance(row, DataError):
            raise row
        if "vision" not in row:
            return row
        most, place = self._recipe.caption_words, part.line.place
        long = {name: text for name, text in row.items() if isinstance(text, str) and len(text.split()) > most}
        if long and not self._recipe.truncate:
            name, text = next(iter(long.items()))
            raise DataError(
                f"{place}: field {name!r} has {len(text.split())} words, more than caption_words {most}; shorten it,"
                " raise caption_words, or cut it: long_captions truncate"
            )
        told.cut((place, name) for name in long)
        return row | {name: " ".join(text.split()[:most]) for name, text in long.items()}


class Told:
    """What was wrong with lines: each fault once, however many examples a line is in."""

    def __init__(self) -> None:
        self.skipped: dict[str, None] = {}
        self._cut: set[tuple[str, str]] = set()

    def skip(self, error: DataError) -> None:
        self.skipped.setdefault(str(error))

    def cut(self, fields: Iterable[tuple[str, str]]) -> None:
        self._cut |= set(fields)

    @property
    def truncated(self) -> int:
        """How many fields were cut."""
        return len(self._cut)


def as_video(rows: Sequence[dict], needle: int | None, place: str) -> dict:
    """One row: the frames of all, and the texts of all joined by "; ", or of the needle alone."""
    if any("vision" not in row for row in rows):
        raise DataError(f"{place}: a line without a picture or codes cannot be joined into a video")
    vision = np.concatenate([np.asarray(row["vision"], np.int64) for row in rows])
    if needle is not None:
        return rows[needle] | {"vision": vision}
    texts = [name for name in rows[0] if all(isinstance(row.get(name), str) for row in rows) and name != "fields"]
    spec = {"fields": rows[0]["fields"]} if "fields" in rows[0] else {}
    return {name: "; ".join(row[name] for row in rows) for name in texts} | {"vision": vision} | spec


def _groups(bundles: Sequence[Bundle], lines: int) -> Iterator[tuple[Bundle, ...]]:
    """Bundles of about so many lines together."""
    group, count = [], 0
    for bundle in bundles:
        group.append(bundle)
        count += len(bundle.parts)
        if count >= lines:
            yield tuple(group)
            group, count = [], 0
    if group:
        yield tuple(group)


class PictureEncoder:
    """Frames to codes, in batches of one shape."""

    def __init__(self, path: str):
        import jax

        from ringjax.models import vqgan

        self._model = vqgan.load_vqgan(vision_tokenizer_path(path))
        self.config = self._model.config
        self.resolution, self.channels = self.config.resolution, self.config.channels
        self.fingerprint = vqgan.vqgan_fingerprint(self._model)
        self._encode = vqgan.encode_pictures
        self.at_once = AT_ONCE_ON_CPU if jax.default_backend() == "cpu" else AT_ONCE

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """`[n, h, w]` codes of `[n, H, W]` or `[n, H, W, 3]` uint8 frames."""
        filled = np.resize(frames, (-len(frames) % self.at_once + len(frames), *frames.shape[1:]))
        return self._encode(self._model, filled, batch_size=self.at_once)[: len(frames)]


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


def work(number: int, bundles: tuple[Bundle, ...]) -> ShardResult:
    """Write one shard in a worker process."""
    return _writer.write(number, bundles)
