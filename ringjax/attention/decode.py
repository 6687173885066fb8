"""Attention of a few new tokens over a long cache (Flash-Decoding)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ringjax.attention import kernels, layouts, quantised, validate
from ringjax.attention.api import Attention
from ringjax.attention.kernels import mosaic, reference
from ringjax.attention.kernels.base import Score
from ringjax.attention.merge import Partial, merge, merge_across
from ringjax.attention.reach import Reach

# Up to this many new tokens all their scores are held at once, [B, N, T_new, S] float32: linear in the cache,
# and one pass over K and V with nothing between the reads.
FEW = 8


def decode_attention(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K Hv"],
    *,
    lengths: Int[Array, " B"],
    axis_name: str | None = None,
    layout: str | layouts.Layout = "contiguous",
    window: int | None = None,
    reach: Reach | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Attention:
    """Attention of the last T tokens of each row over a KV cache that already holds them.

    `lengths` (integers `[B]`) counts the tokens in the cache, the new ones included: query t of row b is at
    position `lengths[b] − T + t` and sees the positions up to its own, with `window` only the last `window`
    of them. `reach` (int32 `[B, T]`) overrides that, in the same positions. Slots at or past `lengths` are
    never seen, whatever finite numbers they hold.

    With `axis_name` (inside `shard_map`), q and lengths are the same on all devices of that axis and the caches
    are shards of one of S·R slots, in `layout` order. Each device attends to its own slots and the partial
    results are merged: one small reduction, no part of the cache moves (arXiv:2408.04093).

    Returns out `[B, T, N, Hv]` in q's type (and lse `[B, N, T]` float32), the same on all devices.
    """
    out, lse = cached_attention(
        q, k_cache[None], v_cache[None], jnp.int32(0), lengths=lengths, axis_name=axis_name, layout=layout,
        window=window, reach=reach, scale=scale, softcap=softcap, backend=backend,
    )  # fmt: skip
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def cached_attention(
    q: Float[Array, "B T N H"],
    k_caches: Float[Array, "layers B S K H"],
    v_caches: Float[Array, "layers B S K Hv"],
    layer: Int[Array, ""],
    *,
    lengths: Int[Array, " B"],
    axis_name: str | None = None,
    layout: str | layouts.Layout = "contiguous",
    window: int | None = None,
    reach: Reach | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    sinks: int = 0,
    q_sinks: Float[Array, "B T N H"] | None = None,
    scales: tuple[Float[Array, "layers B S K"], Float[Array, "layers B S K"]] | None = None,
) -> Partial:
    """`decode_attention` over one layer of the caches of all, which are read where they lie; float32 out and lse.

    With `sinks` the first tokens of the cache are seen too, by `q_sinks`, once they have left the window. With `scales`
    (of K and of V) the caches hold int8 numbers.
    """
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype if scales is None else q.dtype) for x in (k_caches, v_caches)]
    validate.arrays(q, *one, "k_cache", "v_cache")
    batch, new = q.shape[:2]
    order, slots = layouts.get(layout), k_caches.shape[2]
    ring_size = 1 if axis_name is None else lax.axis_size(axis_name)
    lengths = _lengths(lengths, batch)
    index = lengths[:, None] - new + jnp.arange(new, dtype=jnp.int32)
    if reach is None:
        reach = Reach(index, jnp.zeros_like(index), max_ahead=0)
        reach = reach if window is None else reach.within(window)
    reach.validate(batch, new)
    start, stop = reach.interval(index)
    stop = jnp.minimum(stop, lengths[:, None])
    shard = 0 if axis_name is None else lax.axis_index(axis_name)
    lo, hi = (order.slots_below(x, shard, ring_size, slots) for x in (start, stop))
    score = validate.score(scale, softcap, q.shape[-1])
    caches = k_caches, v_caches, *(scales or ())
    part = _attend(q, caches, layer, lo, hi, score, backend)
    if sinks:
        gone = order.slots_below(jnp.clip(start, 0, sinks), shard, ring_size, slots)
        k, v = _layer(tuple(x[:, :, :sinks] for x in caches), layer, q.dtype)
        part = merge(part, reference.forward(q_sinks, k, v, jnp.zeros_like(gone), gone, score))
    return part if axis_name is None else merge_across(part, axis_name)


def _attend(q, caches: tuple[Array, ...], layer, lo, hi, score: Score, backend: str) -> Partial:
    few = backend == "auto" and q.shape[1] <= FEW
    if few and len(caches) == 4:
        one = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in caches)
        return quantised.forward(q, *one, lo, hi, score)
    if few and mosaic.refuses_few(q, *caches, score) is None:
        from ringjax.attention.kernels.mosaic import split_kernel

        return split_kernel.forward(q, *caches, layer, lo, hi, score)
    k, v = _layer(caches, layer, q.dtype)
    kernel = kernels.choose("reference" if few else backend, q, k, v, score).interval
    if kernel is None:
        raise NotImplementedError(
            f"backend {backend!r} does not serve decoding: how much of the cache is seen is data; use backend='auto'"
        )
    return Partial(*kernel.forward(q, k, v, lo, hi, score))


def _layer(caches: tuple[Array, ...], layer, dtype) -> tuple[Array, Array]:
    """K and V of one layer."""
    if len(caches) == 4:
        return quantised.layer_of(caches, layer, dtype)
    k, v = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in caches)
    return k, v


def _lengths(lengths, batch: int) -> Int[Array, " B"]:
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths has shape {lengths.shape} and type {lengths.dtype}; give one integer a row, shape {(batch,)}"
        )
    return lengths.astype(jnp.int32)
