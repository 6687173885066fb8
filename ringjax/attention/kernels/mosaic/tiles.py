"""Which blocks of keys a tile of queries meets, and which tiles of queries a block of keys does.

Kernels loop over these blocks and no others, so work follows the intervals. A block that every query of the tile sees
whole needs no mask: a loop from `first` to `stop` masks outside `full_first … full_stop − 1`.

            lo          hi          of the queries of one tile
    ...|....|:::|###|###|:::|....|...     : masked   # full
            first           stop
                full_first
                        full_stop
"""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int


class Blocks(NamedTuple):
    """For each tile the blocks it meets, `first … stop − 1`, and those among them that need no mask."""

    first: Int[Array, "B tiles"]
    full_first: Int[Array, "B tiles"]
    full_stop: Int[Array, "B tiles"]
    stop: Int[Array, "B tiles"]

    def stacked(self) -> Int[Array, "B tiles 4"]:
        """As one array, for a kernel."""
        return jnp.stack(self, axis=-1)


class Tiles(NamedTuple):
    """Bounds over the queries of each tile: of those that see something, and of all (the blind ones are empty)."""

    least_lo: Int[Array, "B tiles"]
    most_hi: Int[Array, "B tiles"]
    most_lo: Int[Array, "B tiles"]
    least_hi: Int[Array, "B tiles"]

    @classmethod
    def of(cls, lo: Int[Array, "B T"], hi: Int[Array, "B T"], keys: int, tile: int) -> "Tiles":
        """Tiles of `tile` queries, a last one may be shorter; lo and hi lie within the keys."""
        blind = lo >= hi
        lo, hi = jnp.where(blind, keys, lo), jnp.where(blind, 0, hi)
        least = lambda x, nothing: rearrange(padded(x, tile, nothing), "b (n t) -> b n t", t=tile).min(-1)  # noqa: E731
        most = lambda x, nothing: rearrange(padded(x, tile, nothing), "b (n t) -> b n t", t=tile).max(-1)  # noqa: E731
        return cls(least(lo, keys), most(hi, 0), most(lo, 0), least(hi, keys))


def key_blocks(tiles: Tiles, keys: int, block: int) -> Blocks:
    """The blocks of `block` keys that each tile of queries meets."""
    first = tiles.least_lo // block
    stop = jnp.maximum(-(-tiles.most_hi // block), first)
    # A last block that is cut by the end of the keys is never full: what lies beyond must be masked.
    full_first = jnp.clip(-(-tiles.most_lo // block), first, stop)
    full_stop = jnp.clip(tiles.least_hi // block, full_first, stop)
    return Blocks(first, full_first, full_stop, stop)


def query_tiles(tiles: Tiles, keys: int, block: int) -> Blocks:
    """The tiles of queries that each block of `block` keys meets; those in between that do not are masked whole.

    Of the full ones, the first run.
    """
    count = tiles.least_lo.shape[1]
    index = jnp.arange(count, dtype=jnp.int32)[None, :, None]
    begin = jnp.arange(0, keys, block, dtype=jnp.int32)
    end = jnp.minimum(begin + block, keys)
    least_lo, most_hi, most_lo, least_hi = (x[..., None] for x in tiles)
    meets = (least_lo < end) & (most_hi > begin)
    full = meets & (most_lo <= begin) & (least_hi >= end)
    lowest = lambda condition: jnp.min(index, axis=1, where=condition, initial=count)  # noqa: E731
    first = lowest(meets)
    stop = jnp.maximum(jnp.max(index + 1, axis=1, where=meets, initial=0), first)
    full_first = jnp.clip(lowest(full), first, stop)
    full_stop = jnp.clip(lowest(~full & (index > full_first[:, None])), full_first, stop)
    return Blocks(first, full_first, full_stop, stop)


def padded(x: Array, multiple: int, fill) -> Array:
    """`x` with its last axis filled up to a multiple of `multiple`."""
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill) if missing else x
