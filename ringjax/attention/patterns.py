"""What a hop's queries see of the visiting keys, where that is known without looking at data.

Under a causal mask (or none) every hop is a rectangle of the T queries and S keys of a shard, seen whole or with a
diagonal, or nothing at all. Fused kernels for such rectangles are the fastest there are. With the source of the keys
earlier than, equal to, or later than the shard of the queries:

              earlier              own         later
    contiguous  whole              causal      nothing
    striped     causal             causal      causal, without the first query and the last key
    zigzag      first half of      causal      second half of the queries,
                the keys, whole                whole
"""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Queries `queries` see keys `keys` (first, stop): all of them, or if `causal` query i of them the first i + 1."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool

    def __post_init__(self):
        if self.causal and self.length != self.keys[1] - self.keys[0]:
            raise ValueError(f"a causal pattern is a square, not {self.queries} by {self.keys}")

    @property
    def length(self) -> int:
        """Queries that see something."""
        return self.queries[1] - self.queries[0]

    def rows(self, x, axis: int):
        """The part of `x` that belongs to these queries."""
        return _part(x, self.queries, axis)

    def columns(self, x, axis: int):
        """The part of `x` that belongs to these keys."""
        return _part(x, self.keys, axis)


class Patterns(NamedTuple):
    """The patterns by where the visiting keys come from; None: nothing is seen."""

    earlier: Pattern | None
    own: Pattern | None
    later: Pattern | None


def whole(length: int, keys: int) -> Pattern:
    """Every query sees every key."""
    return Pattern((0, length), (0, keys), causal=False)


def causal(length: int) -> Pattern:
    """Query i sees keys 0 … i."""
    return Pattern((0, length), (0, length), causal=True)


def strictly_causal(length: int) -> Pattern | None:
    """Query i sees keys 0 … i − 1; the first one nothing."""
    return Pattern((1, length), (0, length - 1), causal=True) if length > 1 else None


def _part(x, bounds: tuple[int, int], axis: int):
    if bounds == (0, x.shape[axis]):
        return x
    return x[(slice(None),) * (axis % x.ndim) + (slice(*bounds),)]
