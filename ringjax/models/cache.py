"""Keys and values of the tokens so far, kept rotated, possibly cut over the ring in layout order."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ringjax.attention import decode_attention, layouts
from ringjax.models.parallel import Parallel

_AXES = ("batch", "sequence", "kv_heads", None)


class KVCache(NamedTuple):
    """`k` and `v` of every layer, `lengths` tokens of each row; slots at and past a row's length hold anything."""

    k: Float[Array, "layers B S K H"]
    v: Float[Array, "layers B S K H"]
    lengths: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """S, the tokens that a row can hold."""
        return self.k.shape[2]


def check_capacity(length: int, capacity: int, parallel: Parallel) -> None:
    """Raises where a prefill of `length` tokens does not fit a cache of `capacity`, or not in this layout."""
    if capacity < length:
        raise ValueError(f"cache_length {capacity} is shorter than the {length} tokens of the prefill")
    layouts.get(parallel.layout).validate(capacity, parallel.ring_size)
    if parallel.ring_size > 1 and parallel.layout != "striped" and capacity != length:
        # Only in stripes does a token keep its slot when the cache is longer than the prefill.
        raise NotImplementedError(
            f"cache_length {capacity} for a prefill of {length} tokens in layout {parallel.layout!r} over sp ="
            f" {parallel.ring_size}: its tokens would have to move; use layout 'striped' or a mesh with sp 1"
        )


def widen(x: Float[Array, "B T K H"], capacity: int, parallel: Parallel) -> Float[Array, "B S K H"]:
    """The keys or values of a prefill with empty slots after those of each shard, without moving any."""
    batch, length, *rest = x.shape
    ring_size = parallel.ring_size
    shards = x.reshape(batch, ring_size, length // ring_size, *rest)
    empty = (capacity - length) // ring_size
    wide = jnp.pad(shards, ((0, 0), (0, 0), (0, empty), (0, 0), (0, 0)))
    return parallel.constrain(wide.reshape(batch, capacity, *rest), *_AXES)


def append_and_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, " B"],
    *,
    parallel: Parallel,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Writes T new tokens after the `lengths` ones of each row and attends to all of them; the caches do not move.

    A token past the capacity is not written (the caller checks: lengths are data).
    """
    new = q.shape[1]
    queries = parallel.spec_for(q.shape, "batch", None, "heads", None)
    news = parallel.spec_for(k.shape, "batch", None, "kv_heads", None)
    caches = parallel.spec_for(k_cache.shape, *_AXES)
    rows = parallel.spec_for(lengths.shape, "batch")
    axis_name = "sp" if parallel.present("sp") else None

    def local(q, k, v, k_cache, v_cache, lengths):
        slots = _slots(lengths, new, k_cache.shape[1], axis_name, parallel)
        row = jnp.arange(k.shape[0])[:, None]
        k_cache, v_cache = (
            cache.at[row, slots].set(x.astype(cache.dtype), mode="drop") for cache, x in ((k_cache, k), (v_cache, v))
        )
        out = decode_attention(
            q, k_cache, v_cache, lengths=lengths + new, axis_name=axis_name, window=window, softcap=softcap,
            layout=parallel.layout, backend=parallel.backend,
        )  # fmt: skip
        return out, k_cache, v_cache

    in_specs = (queries, news, news, caches, caches, rows)
    return parallel.local(local, in_specs, (queries, caches, caches))(q, k, v, k_cache, v_cache, lengths)


def _slots(lengths, new: int, capacity: int, axis_name: str | None, parallel: Parallel) -> Int[Array, "B T"]:
    """The slot of each new token in this device's shard; past the end where it lives on another device."""
    index = lengths[:, None] + jnp.arange(new, dtype=jnp.int32)
    shard = lax.axis_index(axis_name) if axis_name else 0
    order, ring_size = layouts.get(parallel.layout), parallel.ring_size
    slot, after = (order.slots_below(x, shard, ring_size, capacity) for x in (index, index + 1))
    return jnp.where(after > slot, slot, capacity)
