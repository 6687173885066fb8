"""Held-out pictures and clips with their captions, as codes of a run's image tokenizer.

A line of the .jsonl has a caption and either codes or the name of a picture, as `ringjax tokenize` takes them:

    {"caption": "a cat", "vision": [11, 12, …]}            codes, frame after frame, without end marks
    {"caption": "a cat", "file": "cat.webp"}               encoded by the run's image tokenizer
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from ringjax.data.errors import DataError
from ringjax.data.fields import FieldEncoder
from ringjax.data.heldout import heldout as is_heldout
from ringjax.data.jsonl import JsonLines
from ringjax.data.pictures import is_clip, read_frames
from ringjax.evaluation.vision_config import Kind, VisionConfig
from ringjax.inference.trained import TrainedRun
from ringjax.inside import inside

DIGITS = "sample:digits"
# Frames that go through the image tokenizer at once: one compiled shape, and a bound on memory.
_FRAMES_AT_ONCE = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """One held-out picture or clip, not read yet."""

    index: int
    """Its number among the lines of the wanted side of the split, from 0, over all files."""
    caption: str
    kind: Kind
    place: str
    """How an error names it."""
    codes: Int[np.ndarray, "frames codes"] | None
    file: Path | None
    """Where `codes` are not given."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The lines of a held-out set, and the run that sees them."""

    run: TrainedRun
    config: VisionConfig
    lines: tuple[Line, ...]
    """Those of the wanted kinds."""
    fingerprint: str
    """A short name of the whole set: captions, codes, names of files and the image tokenizer that encodes them."""

    @classmethod
    def open(cls, run: TrainedRun, config: VisionConfig) -> "HeldOut":
        """Raises DataError or ValueError for a line that cannot be used, FileNotFoundError where there is no file."""
        run.require_vision()
        whole = _lines(run, config)
        lines = tuple(line for line in whole if line.kind in config.kinds)
        if not lines:
            split = "" if config.split == "all" else f" in split {config.split}"
            raise ValueError(f"{' '.join(config.data) or DIGITS} holds no {' or '.join(config.kinds)}{split}")
        return cls(run, config, lines, _fingerprint(run, config, whole))

    def captions(self, kind: Kind) -> list[str]:
        """All different captions of a kind, in their order; capitals and spaces make no difference."""
        found: dict[str, str] = {}
        for line in self.lines:
            if line.kind == kind:
                found.setdefault(same_words(line.caption), line.caption)
        return list(found.values())

    def chosen(self, count: int | None, kind: Kind | None = None) -> list[Line]:
        """At most `count` of each kind (None: all), drawn with the seed: those of a smaller count are among them."""
        kept: list[Line] = []
        for number, name in enumerate(("pictures", "clips")):
            some = [line for line in self.lines if line.kind == name and kind in (None, name)]
            order = np.random.default_rng([self.config.seed, number]).permutation(len(some))
            kept += [some[i] for i in sorted(order[:count])]
        return kept

    def codes(self, lines: Sequence[Line]) -> list[Int[np.ndarray, "frames codes"]]:
        """The codes of each line; pictures are read and encoded some at a time."""
        found: dict[int, np.ndarray] = {line.index: line.codes for line in lines if line.codes is not None}
        waiting: list[tuple[int, np.ndarray]] = []
        for number, line in enumerate(lines):
            if line.codes is None:
                waiting.append((line.index, self.frames(line)))
            if waiting and (number + 1 == len(lines) or sum(len(f) for _, f in waiting) >= _FRAMES_AT_ONCE):
                found |= _encoded(self.run, waiting)
                waiting = []
        return [found[line.index] for line in lines]

    def frames(self, line: Line) -> UInt8[np.ndarray, "frames H W *C"]:
        """A picture or clip as the image tokenizer takes it; of codes, what it makes of them."""
        if line.file is None:
            return self.run.to_pictures(line.codes)
        size, fit = self.run.vqgan.config, self.config.fit or self.run.fit
        options = dict(channels=size.channels, fit=fit, max_frames=self.run.data.max_frames)
        try:
            return read_frames(line.file, size.resolution, **options)
        except DataError as error:
            raise DataError(f"{line.place}: {error}") from None


def same_words(caption: str) -> str:
    """What two captions have in common that are the same to people."""
    return " ".join(caption.casefold().split())


def _fingerprint(run: TrainedRun, config: VisionConfig, lines: Sequence[Line]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        name = line.codes.tobytes().hex() if line.codes is not None else f"{line.file.name} {line.file.stat().st_size}"
        digest.update(f"{line.index} {line.caption} {line.kind} {name}\n".encode())
    if any(line.file is not None for line in lines):
        from ringjax.models.vqgan import vqgan_fingerprint

        digest.update(f"{vqgan_fingerprint(run.vqgan)} {config.fit or run.fit} {run.data.max_frames}".encode())
    return digest.hexdigest()[:16]


def _lines(run: TrainedRun, config: VisionConfig) -> list[Line]:
    if config.data in ((), (DIGITS,)):
        return _digits(run, config)
    encoder = FieldEncoder(
        run.tokenizer, codes_per_frame=run.data.codes_per_frame, vision_codes=run.data.vision_codes,
        max_frames=run.data.max_frames,
    )  # fmt: skip
    found: list[Line] = []
    for name in config.data:
        found += _lines_of(name, len(found), encoder, config)
    return found


def _lines_of(name: str, first: int, encoder: FieldEncoder, config: VisionConfig) -> list[Line]:
    """The lines of a file that are on the wanted side of the split, numbered from `first` on."""
    wanted = {"all": (False, True), "train": (False,), "heldout": (True,)}[config.split]
    rows, found = JsonLines(name), []
    for number in range(len(rows)):
        row, place = rows[number], rows.place(number)
        caption = row.get(config.caption_key)
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{place}: field {config.caption_key!r} must be a caption, not {caption!r}")
        if is_heldout(caption, config.heldout_share) in wanted:
            found.append(_line(row, caption, first + len(found), place, Path(name).parent, encoder, config))
    return found


def _digits(run: TrainedRun, config: VisionConfig) -> list[Line]:
    from ringjax.data.samples_vision import digit_rows

    if not config.data and not any(source.path == DIGITS for source in run.data.sources):
        raise ValueError(f"{config.model} was not trained on the digits; name held-out pictures with --data")
    if config.split != "all":
        raise ValueError(f"split {config.split} of {DIGITS}: its held-out part is what is asked; leave split out")
    rows, codes = digit_rows("heldout")
    if run.data.codes_per_frame != len(rows[0]["vision"]) or run.data.vision_codes < codes:
        raise ValueError(
            f"{DIGITS} has {len(rows[0]['vision'])} codes a picture of {codes}, and {config.model} was trained with"
            f" codes_per_frame {run.data.codes_per_frame} and vision_codes {run.data.vision_codes}; give other --data"
        )
    return [
        Line(i, row["caption"], "pictures", f"{DIGITS} {i}", np.asarray(row["vision"], np.int32)[None], None)
        for i, row in enumerate(rows)
    ]


def _line(
    row: Mapping[str, Any], caption: str, index: int, place: str, folder: Path, encoder: FieldEncoder,
    config: VisionConfig,
) -> Line:  # fmt: skip
    if "vision" in row:
        codes = encoder.frames(row["vision"], f"{place}: field 'vision'")
        return Line(index, caption, "clips" if len(codes) > 1 else "pictures", place, codes, None)
    name = row.get(config.picture_key)
    if not isinstance(name, str) or not name:
        raise DataError(f"{place}: neither codes ('vision') nor a picture ({config.picture_key!r}); give one of them")
    try:
        file = inside(folder, name)
        clip = is_clip(file) and encoder.max_frames != 1
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None
    return Line(index, caption, "clips" if clip else "pictures", place, None, file)


def _encoded(run: TrainedRun, some: Sequence[tuple[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """The codes of frames, by the number of their line."""
    found = {}
    # By size: with fit "centre" pictures keep theirs.
    for size in dict.fromkeys(frames.shape[1:] for _, frames in some):
        alike = [(index, frames) for index, frames in some if frames.shape[1:] == size]
        together = np.concatenate([frames for _, frames in alike])
        filled = np.resize(together, (-len(together) % _FRAMES_AT_ONCE + len(together), *size))
        parts = [run.to_codes(filled[i : i + _FRAMES_AT_ONCE]) for i in range(0, len(filled), _FRAMES_AT_ONCE)]
        stops = np.cumsum([len(frames) for _, frames in alike])
        codes = np.split(np.concatenate(parts)[: len(together)].astype(np.int32), stops[:-1])
        found |= {index: grid for (index, _), grid in zip(alike, codes, strict=True)}
    return found
