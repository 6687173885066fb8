"""Blockwise attention in plain XLA: memory linear in the length, on any device, for any interval.

Queries are cut into tiles, and each tile loops over the chunks of K and V between the smallest `lo` and the
largest `hi` of its queries, with an online softmax (Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022,
arXiv:2205.14135). Chunks outside every interval are never read. Sizes need not divide: the last tile or
chunk is moved back to end with the array, and what it sees again is masked.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Int

from ringjax.attention.kernels.base import Gradients, Kernel, Score, accumulator, product, varying_like
from ringjax.attention.merge import Partial

# The fastest of those tried on an H100 (docs/results/tiles.md). The scores of a tile and chunk are all that is
# larger than the inputs: 4 · N · 2048² bytes, 0.5 GB for 32 heads.
QUERY_TILE = 2048
KEY_CHUNK = 2048


class Cut(NamedTuple):
    """An axis cut into `count` pieces of `size`; the last one is moved back to end with the axis."""

    length: int
    size: int
    count: int

    @classmethod
    def of(cls, length: int, at_most: int) -> "Cut":
        count = max(1, math.ceil(length / at_most))
        return cls(length, math.ceil(length / count), count)

    def start(self, index):
        return jnp.minimum(index * self.size, self.length - self.size)

    def own(self, index) -> Bool[Array, " size"]:
        """Which places of piece `index` no earlier piece has covered."""
        return self.start(index) + jnp.arange(self.size) >= index * self.size


def forward(q, k, v, lo, hi, score: Score) -> Partial:
    """As `reference.forward`."""
    return _by_row(_forward, q, k, v, lo, hi, score=score)


def backward(q, k, v, out, lse, dout, delta, lo, hi, score: Score) -> Gradients:
    """As `reference.backward`."""
    del out
    return Gradients(*_by_row(_backward, q, k, v, lse, dout, delta, lo, hi, score=score))


def _by_row(function, *arrays, score: Score):
    """As many rows at a time as have one tile of queries together: long rows alone, so each skips by its intervals."""
    batch, length = arrays[0].shape[:2]
    fits = (rows for rows in range(batch, 0, -1) if batch % rows == 0 and rows * length <= QUERY_TILE)
    together = next(fits, 1)
    if together == batch:
        return function(*arrays, score=score)
    groups = jax.tree.map(lambda x: rearrange(x, "(n b) ... -> n b ...", b=together), arrays)
    results = lax.map(lambda group: function(*group, score=score), groups)
    return jax.tree.map(lambda x: rearrange(x, "n b ... -> (n b) ..."), results)


def _forward(q, k, v, lo, hi, *, score: Score) -> Partial:
    batch, length, heads, _ = q.shape
    groups, head_dim, dtype = k.shape[2], v.shape[-1], accumulator(q, k, v)
    tiles, chunks = Cut.of(length, QUERY_TILE), Cut.of(k.shape[1], KEY_CHUNK)
    q = rearrange(q, "b t (k g) h -> b k g t h", k=groups)
    k, v = (rearrange(x, "b s k h -> b k s h") for x in (k, v))

    def attend_tile(whole, index):
        start = tiles.start(index)
        q_tile = _piece(q, start, tiles.size, 3)
        lo_tile, hi_tile = (_piece(x, start, tiles.size, 1) for x in (lo, hi))

        def attend_chunk(chunk, carry):
            summed, total, peak = carry
            k_chunk, v_chunk = (_piece(x, chunks.start(chunk), chunks.size, 2) for x in (k, v))
            scores = score(product("bkgth,bksh->bkgts", q_tile, k_chunk))
            visible = _visible(chunks, chunk, lo_tile, hi_tile)
            higher = jnp.maximum(peak, jnp.max(jnp.where(visible, scores, lowest), axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - higher[..., None]), 0)
            decay = jnp.exp(peak - higher)
            addend = product("bkgts,bksh->bkgth", weights.astype(v.dtype), v_chunk)
            return summed * decay[..., None] + addend, total * decay + weights.sum(-1), higher

        lowest = jnp.finfo(dtype).min
        shape = (batch, groups, heads // groups, tiles.size)
        zero = jnp.zeros(shape, dtype), jnp.full(shape, lowest, dtype)
        initial = varying_like((jnp.zeros((*shape, head_dim), dtype), *zero), q, k, v, lo, hi)
        first, last = _chunks_within(chunks, lo_tile, hi_tile)
        summed, total, peak = lax.fori_loop(first, last, attend_chunk, initial)
        seen = total > 0
        some = jnp.where(seen, total, 1)
        lse = jnp.where(seen, peak + jnp.log(some), -jnp.inf)
        out_tile = Partial(
            rearrange(summed / some[..., None], "b k g t h -> b t (k g) h"), rearrange(lse, "b k g t -> b (k g) t")
        )
        return Partial(_replace(whole.out, out_tile.out, start, 1), _replace(whole.lse, out_tile.lse, start, 2)), None

    nothing = Partial(jnp.zeros((batch, length, heads, head_dim), dtype), jnp.zeros((batch, heads, length), dtype))
    return _for_each_tile(attend_tile, varying_like(nothing, q, k, v, lo, hi), tiles)


def _backward(q, k, v, lse, dout, delta, lo, hi, *, score: Score) -> tuple[Array, Array, Array]:
    groups, dtype = k.shape[2], accumulator(q, k, v)
    tiles, chunks = Cut.of(q.shape[1], QUERY_TILE), Cut.of(k.shape[1], KEY_CHUNK)
    q, dout = (rearrange(x, "b t (k g) h -> b k g t h", k=groups) for x in (q, dout))
    k, v = (rearrange(x, "b s k h -> b k s h") for x in (k, v))
    lse = jnp.where(jnp.isneginf(lse), 0, lse)  # such a query sees nothing here either, and exp stays finite
    lse, delta = (rearrange(x, "b (k g) t -> b k g t", k=groups) for x in (lse, delta))

    def attend_tile(carry, index):
        dq, dk, dv = carry
        start = tiles.start(index)
        q_tile, dout_tile, lse_tile, delta_tile = (_piece(x, start, tiles.size, 3) for x in (q, dout, lse, delta))
        lo_tile, hi_tile = (_piece(x, start, tiles.size, 1) for x in (lo, hi))
        hi_tile = jnp.where(tiles.own(index), hi_tile, lo_tile)  # queries seen before add nothing

        def attend_chunk(chunk, carry):
            dq_tile, dk, dv = carry
            place = chunks.start(chunk)
            k_chunk, v_chunk = (_piece(x, place, chunks.size, 2) for x in (k, v))
            scores = score(product("bkgth,bksh->bkgts", q_tile, k_chunk))
            visible = _visible(chunks, chunk, lo_tile, hi_tile)
            p = jnp.where(visible, jnp.exp(scores - lse_tile[..., None]), 0)
            ds = p * (product("bkgth,bksh->bkgts", dout_tile, v_chunk) - delta_tile[..., None])
            ds = (ds * score.gradient(scores)).astype(q.dtype)
            dv_chunk = product("bkgts,bkgth->bksh", p.astype(dout.dtype), dout_tile)
            return (
                dq_tile + product("bkgts,bksh->bkgth", ds, k_chunk),
                _add(dk, product("bkgts,bkgth->bksh", ds, q_tile), place, 2),
                _add(dv, dv_chunk, place, 2),
            )

        first, last = _chunks_within(chunks, lo_tile, hi_tile)
        nothing = varying_like(jnp.zeros(q_tile.shape, dtype), dq)
        dq_tile, dk, dv = lax.fori_loop(first, last, attend_chunk, (nothing, dk, dv))
        return (_add(dq, dq_tile, start, 3), dk, dv), None

    zeros = tuple(jnp.zeros(x.shape, dtype) for x in (q, k, v))
    zeros = varying_like(zeros, q, k, v, lse, dout, delta, lo, hi)
    dq, dk, dv = _for_each_tile(attend_tile, zeros, tiles)
    dk, dv = (rearrange(x, "b k s h -> b s k h") for x in (dk, dv))
    return rearrange(dq, "b k g t h -> b t (k g) h"), dk, dv


def _for_each_tile(attend_tile, carry, tiles: Cut):
    return lax.scan(attend_tile, carry, jnp.arange(tiles.count, dtype=jnp.int32))[0]


def _chunks_within(chunks: Cut, lo: Int[Array, "B T"], hi: Int[Array, "B T"]) -> tuple[Array, Array]:
    """The first chunk that some query of the tile sees, and one past the last."""
    some = lo < hi
    lowest = jnp.min(lo, initial=chunks.length, where=some)
    highest = jnp.max(hi, initial=0, where=some)
    return jnp.clip(lowest, 0) // chunks.size, -(-jnp.clip(highest, 0, chunks.length) // chunks.size)


def _visible(chunks: Cut, chunk, lo, hi) -> Bool[Array, "B 1 1 T C"]:
    slot = chunks.start(chunk) + jnp.arange(chunks.size, dtype=jnp.int32)
    lo, hi = (rearrange(x, "b t -> b 1 1 t 1") for x in (lo, hi))
    return (slot >= lo) & (slot < hi) & chunks.own(chunk)


def _piece(x: Array, start, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _replace(x: Array, piece: Array, start, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, piece, start, axis)


def _add(x: Array, piece: Array, start, axis: int) -> Array:
    return _replace(x, _piece(x, start, piece.shape[axis], axis) + piece, start, axis)


KERNEL = Kernel("xla", forward, backward)
