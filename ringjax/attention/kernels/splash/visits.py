"""Which pairs of query tile and key block a kernel visits, as a list: a grid over it has no idle step.

The intervals of queries are data, and so is the list; its length is the size of the kernel's grid. Here queries are
cut into 4 tiles and keys into 4 blocks, causal with a window; `░` is visited with a mask and `█` without:

    block   0 1 2 3     by queries: (0,0) (1,0) (1,1) (2,0) (2,1) (2,2) (3,1) (3,2) (3,3)
    tile 0  ░           by keys:    (0,0) (1,0) (2,0) (1,1) (2,1) (3,1) (2,2) (3,2) (3,3)
    tile 1  █ ░
    tile 2  ░ █ ░       The forward pass and dQ finish one tile after another, dK and dV one block after
    tile 3    ░ █ ░     another: the list is in that order.

A tile that sees nothing, or a block that nobody sees, has one visit, fully masked: somebody must write its zeros.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Bool, Int

LANES = 128  # a vector register of a TPU holds 8 × 128 numbers: tiles and blocks are multiples of 128


@dataclasses.dataclass(frozen=True)
class Cut:
    """An axis of `length`, padded to `count` pieces of `size`."""

    length: int
    size: int
    count: int

    @classmethod
    def of(cls, length: int, at_most: int) -> "Cut":
        """As few pieces as `at_most` allows, and as small as they can be then: little is padded."""
        count = -(-length // at_most)
        return cls(length, LANES * -(-length // (count * LANES)), count)

    @property
    def padded(self) -> int:
        return self.size * self.count


@dataclasses.dataclass(frozen=True)
class Order:
    """Visits as int32 codes that sort in the order of the visits: by row, then tile and block, or block and tile.

        bits of a code:   … row | tile | block | whole          by_keys:   … row | block | tile | whole

    A kernel takes them apart by shifts and masks, for the scalar core of a TPU is slow to divide.
    """

    queries: Cut
    keys: Cut
    by_keys: bool = False

    def pack(self, row, tile, block, whole):
        outer, inner = (block, tile) if self.by_keys else (tile, block)
        return (((row << self._outer_bits) + outer << self._inner_bits) + inner << 1) + whole

    def row(self, code):
        return self.result(code) >> self._outer_bits

    def tile(self, code):
        return self._inner(code) if self.by_keys else self._outer(code)

    def block(self, code):
        return self._outer(code) if self.by_keys else self._inner(code)

    def whole(self, code):
        """Every query of the tile sees every key of the block: no mask is needed."""
        return code & 1 == 1

    def result(self, code):
        """The same for all visits that add to the same result: those of one tile (by_keys: of one block) of a row."""
        return code >> 1 + self._inner_bits

    def _outer(self, code):
        return self.result(code) & (1 << self._outer_bits) - 1

    def _inner(self, code):
        return code >> 1 & (1 << self._inner_bits) - 1

    @property
    def _outer_bits(self) -> int:
        return _bits(self.keys.count if self.by_keys else self.queries.count)

    @property
    def _inner_bits(self) -> int:
        return _bits(self.queries.count if self.by_keys else self.keys.count)


class Visits(NamedTuple):
    """The first `count` of `codes` are the visits, in order; the rest of them repeat the last."""

    codes: Int[Array, " most"]
    count: Int[Array, ""]


def visits(order: Order, lo: Int[Array, "B T"], hi: Int[Array, "B T"]) -> Visits:
    """What a kernel visits for queries that see the keys `lo … hi − 1`. T is padded to `order.queries.padded`; padding
    sees nothing."""
    seen, whole = blocks_seen(order, lo, hi)
    batch, tiles, blocks = seen.shape
    if order.by_keys:
        seen |= ~reduce(seen, "b tile block -> b 1 block", "any") & (jnp.arange(tiles) == 0)[:, None]
    else:
        seen |= ~reduce(seen, "b tile block -> b tile 1", "any") & (jnp.arange(blocks) == 0)
    row, tile, block = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.int32) for n in seen.shape), indexing="ij")
    codes = order.pack(row, tile, block, whole.astype(jnp.int32))
    count = jnp.sum(seen, dtype=jnp.int32)
    codes = jnp.sort(jnp.where(seen, codes, jnp.iinfo(jnp.int32).max).reshape(-1))
    return Visits(jnp.minimum(codes, codes[count - 1]), count)


def blocks_seen(
    order: Order, lo: Int[Array, "B T"], hi: Int[Array, "B T"]
) -> tuple[Bool[Array, "B tile block"], Bool[Array, "B tile block"]]:
    """Whether a block lies between the first and the last key that a tile sees, and whether all of its queries see all
    of the block.

    So a block in a gap between the intervals of a tile's queries counts as seen. Neighbouring queries leave no gap
    under causal, packed and windowed masks, and nothing larger than tiles × blocks is computed.
    """
    lo, hi = (rearrange(x, "b (tile size) -> b tile 1 size", size=order.queries.size) for x in (lo, hi))
    some = lo < hi
    first = jnp.min(lo, axis=-1, initial=order.keys.padded, where=some)
    last = jnp.max(hi, axis=-1, initial=0, where=some)
    start = jnp.arange(order.keys.count, dtype=jnp.int32) * order.keys.size
    stop = start + order.keys.size
    return (first < stop) & (start < last), (lo.max(-1) <= start) & (stop <= hi.min(-1))


def _bits(count: int) -> int:
    return (count - 1).bit_length()
