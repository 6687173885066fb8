"""The gallery: caption, real and drawn side by side. Pictures as one PNG, clips as one animated WebP.

    a sailing boat
    real   coded   drawn        the file; what the image tokenizer keeps of it; what the model drew from the caption

What is shown is chosen by the seed, not by hand.
"""

import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ringjax.evaluation.drawings import draw
from ringjax.evaluation.heldout import HeldOut, Line
from ringjax.evaluation.vision_config import GalleryConfig, Kind
from ringjax.training import distributed

_MARGIN, _GAP, _LINE = 10, 4, 16
_LINES = 2


class Card(NamedTuple):
    """One caption and its pictures, each some frames `[frames, H, W, 3]`."""

    caption: str
    tiles: tuple[tuple[str, UInt8[np.ndarray, "frames H W 3"]], ...]


def write_gallery(config: GalleryConfig, heldout: HeldOut) -> list[str]:
    """Draws, and writes the files; says which."""
    written = []
    wanted: list[tuple[Kind, int, Path]] = [
        ("pictures", config.pictures, Path(config.output)),
        ("clips", config.clips, config.clips_output),
    ]
    for kind, count, path in wanted:
        lines = heldout.chosen(count, kind)
        if lines:
            frames = [_sheet(config, cards) for cards in _by_frame(_cards(config, heldout, lines))]
            written.append(distributed.same_on_all(functools.partial(_save, path, frames, config.fps)))
    return written


def _cards(config: GalleryConfig, heldout: HeldOut, lines: Sequence[Line]) -> list[Card]:
    """In the order of the lines; drawings of as many frames are made together."""
    run, codes = heldout.run, heldout.codes(lines)
    drawn: dict[int, np.ndarray] = {}
    for count in sorted({len(real) for real in codes}):
        alike = [i for i, real in enumerate(codes) if len(real) == count]
        for first in range(0, len(alike), config.batch):
            some = alike[first : first + config.batch]
            found = draw(run, config, [(lines[i].caption, count) for i in some], config.batch, config.seed)
            drawn |= dict(zip(some, found))
    cards = []
    for i, (line, real) in enumerate(zip(lines, codes)):
        tiles = [("real", heldout.frames(line))] if line.file is not None else []
        tiles += [("coded" if tiles else "real", run.to_pictures(real)), ("drawn", run.to_pictures(drawn[i]))]
        cards.append(Card(line.caption, tuple((name, _colour(frames)) for name, frames in tiles)))
    return cards


def _colour(frames: np.ndarray) -> UInt8[np.ndarray, "frames H W 3"]:
    return frames if frames.ndim == 4 else np.repeat(frames[..., None], 3, axis=-1)


def _by_frame(cards: Sequence[Card]) -> list[list[Card]]:
    """The cards at each moment; shorter clips begin anew."""
    longest = max(len(frames) for card in cards for _, frames in card.tiles)
    at = lambda frames, moment: frames[moment % len(frames)][None]  # noqa: E731
    return [
        [card._replace(tiles=tuple((name, at(frames, moment)) for name, frames in card.tiles)) for card in cards]
        for moment in range(longest)
    ]


def _sheet(config: GalleryConfig, cards: Sequence[Card]) -> Image.Image:
    """The cards in rows; every tile shows its first frame."""
    columns = min(config.columns, len(cards))
    most = max(len(card.tiles) for card in cards)
    width = most * config.tile + (most - 1) * _GAP
    height = _LINES * _LINE + config.tile + _LINE
    rows = -(-len(cards) // columns)
    size = _MARGIN + columns * (width + _MARGIN), _MARGIN + rows * (height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    for number, card in enumerate(cards):
        row, column = divmod(number, columns)
        place = _MARGIN + column * (width + _MARGIN), _MARGIN + row * (height + _MARGIN)
        _draw_card(sheet, place, card, config.tile, width)
    return sheet


def _draw_card(sheet: Image.Image, place: tuple[int, int], card: Card, tile: int, width: int) -> None:
    (left, top), pen = place, ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    words = textwrap.wrap(card.caption, max(8, width // 7), max_lines=_LINES, placeholder=" …")
    for number, line in enumerate(words):
        pen.text((left, top + number * _LINE), line, fill="black", font=font)
    top += _LINES * _LINE
    for number, (name, frames) in enumerate(card.tiles):
        x = left + number * (tile + _GAP)
        # Small pictures (digits) keep their pixels, others are made smaller smoothly.
        how = Image.Resampling.NEAREST if frames.shape[1] < tile // 2 else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(frames[0]).resize((tile, tile), how), (x, top))
        pen.rectangle((x, top, x + tile - 1, top + tile - 1), outline="#cccccc")
        pen.text((x + tile // 2, top + tile + 1), name, fill="#666666", font=small, anchor="ma")


def _save(path: Path, frames: Sequence[Image.Image], fps: float) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webp":
        duration, more = round(1000 / fps), list(frames[1:])
        frames[0].save(path, save_all=True, append_images=more, duration=duration, loop=0, quality=85, method=6)
        return f"{path}: {len(frames)} frames"
    frames[0].save(path, optimize=True)
    return f"{path}: {frames[0].width} × {frames[0].height} pixels"
