"""Which lines make one example, and in which variation of their pictures: the plan of `ringjax tokenize`.

    join 1                    an example a line, `variants` times
    join_as "turns"           some lines one after the other, each by the spec: captions and pictures, interleaved
    join_as "video"           the frames of all of them as one video, their texts joined by "; "
    join_as "needle"          one line's frames among copies of a few others': the texts are those of the one

Lines are joined in a new random order for each of the `variants`, so that a picture stands beside others every time.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ringjax.data.fields import Spec

CONCEALING = 4
"""Lines that a needle hides among, at most, each again and again."""
JoinAs = Literal["turns", "video", "needle"]


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
class Part:
    """A line with the number of the variation in which its picture is seen; 0: as it is."""

    line: Line
    variant: int = 0

    def choose(self, spec: Spec) -> str:
        """The spec of this part: as `fields.choose` for the plain line, another draw for each variation."""
        if isinstance(spec, str):
            return spec
        index = self.line.line_index or 0
        return random.Random(f"{index} {self.variant}" if self.variant else index).choice(list(spec))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The parts of one example; of a needle, `needle` is its place among them."""

    parts: tuple[Part, ...]
    needle: int | None = None


class Lines(Sequence[Line]):
    """The lines of several files one after the other, each made when it is asked for: a corpus has more of them than
    memory holds as objects. `files` are the number of lines of each, and which line is at a place in it."""

    def __init__(self, files: Sequence[tuple[int, Callable[[int], Line]]]):
        self._at = [at for _, at in files]
        self._ends = np.cumsum([count for count, _ in files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, place: int) -> Line:
        if not 0 <= place < len(self):
            raise IndexError(place)
        file = int(np.searchsorted(self._ends, place, side="right"))
        return self._at[file](place - int(self._ends[file - 1] if file else 0))


@dataclasses.dataclass(frozen=True)
class Single(Sequence[Bundle]):
    """Each line by itself, `variants` times."""

    lines: Sequence[Line]
    variants: int

    def __len__(self) -> int:
        return len(self.lines) * self.variants

    def __getitem__(self, place: int) -> Bundle:
        if not 0 <= place < len(self):
            raise IndexError(place)
        line, variant = divmod(place, self.variants)
        return Bundle((Part(self.lines[line], variant),))


@dataclasses.dataclass(frozen=True)
class Portions(Sequence[tuple[Bundle, ...]]):
    """Bundles by `size` at a time: the work of one process, and a file of the data set."""

    bundles: Sequence[Bundle]
    size: int

    def __len__(self) -> int:
        return -(-len(self.bundles) // self.size)

    def __getitem__(self, number: int) -> tuple[Bundle, ...]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        places = range(number * self.size, min((number + 1) * self.size, len(self.bundles)))
        return tuple(self.bundles[place] for place in places)


def plan(
    lines: Sequence[Line], *, variants: int = 1, least: int = 1, most: int = 1, join_as: JoinAs = "turns", seed: int = 0
) -> Sequence[Bundle]:
    """The examples of all lines: `least` to `most` lines in each, every line once in each of the `variants`.

    The last bundle of a variant may have fewer lines. For needles every line is the needle once in each variant.

    Raises:
        ValueError: lines cannot be joined: some are whole texts, or there are too few for a needle.
    """
    if most == 1:
        return Single(lines, variants)
    texts = [line.path for line in lines if line.line_index is None]
    if texts:
        raise ValueError(f"join is for lines of .jsonl files, and {texts[0]} is one text; leave it out, or use join 1")
    if join_as == "needle" and len(lines) < 2:
        raise ValueError(f"a needle needs another line to hide among, and there is {len(lines)}; give more lines")
    bundles = []
    for variant in range(variants):
        rng = np.random.default_rng((seed, variant))
        order = [Part(lines[i], variant) for i in rng.permutation(len(lines))]
        if join_as == "needle":
            bundles += [_hide(order, number, rng, least, most) for number in range(len(order))]
            continue
        while order:
            taken = int(rng.integers(least, most + 1))
            bundles.append(Bundle(tuple(order[:taken])))
            order = order[taken:]
    return bundles


def _hide(order: list[Part], number: int, rng: np.random.Generator, least: int, most: int) -> Bundle:
    """Part `number` at a random depth among copies of one to four others."""
    few = 1 + rng.permutation(len(order) - 1)[: int(rng.integers(1, CONCEALING + 1))]
    places = max(2, int(rng.integers(least, most + 1)))
    parts = [order[(number + int(i)) % len(order)] for i in rng.choice(few, places)]
    depth = int(rng.integers(places))
    parts[depth] = order[number]
    return Bundle(tuple(parts), needle=depth)
