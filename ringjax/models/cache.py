"""Keys and values of the tokens so far, kept rotated, possibly cut over the ring in layout order."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ringjax.attention import layouts
from ringjax.attention.decode import cached_attention
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


def without(cache: KVCache, first: int, gone: Int[Array, ""], *, parallel: Parallel) -> KVCache:
    """The cache without the `gone` tokens that follow the `first` ones of each row; no token changes its device.

    Both are multiples of the ring size, and the layout is striped where it is above 1.
    """
    spec = parallel.spec_for(cache.k.shape, None, *_AXES)
    ring_size = parallel.ring_size

    def local(x, gone):
        slot = jnp.arange(x.shape[2])
        kept = jnp.where(slot < first // ring_size, slot, jnp.minimum(slot + gone // ring_size, x.shape[2] - 1))
        return jnp.take(x, kept, axis=2)

    shift = parallel.local(local, (spec, P()), spec)
    return KVCache(shift(cache.k, gone), shift(cache.v, gone), cache.lengths - gone)


def append_and_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: KVCache,
    layer: Int[Array, ""],
    *,
    parallel: Parallel,
    window: int | None = None,
    softcap: float | None = None,
    sinks: int = 0,
    q_sinks: Float[Array, "B T N H"] | None = None,
) -> tuple[Float[Array, "B T N H"], KVCache]:
    """Writes a layer's T new tokens after the `lengths` ones of each row and attends to all of them.

    The caches do not move, and inside a compiled loop they are changed in place. `lengths` stays. Of several tokens
    those past the capacity are not written; a single one must have room (the caller checks: lengths are data).
    """
    new, kv_heads = q.shape[1], k.shape[2]
    queries = parallel.spec_for(q.shape, "batch", None, "heads", None)
    news = parallel.spec_for(k.shape, "batch", None, "kv_heads", None)
    caches = parallel.spec_for(cache.k.shape, None, *_AXES)
    rows = parallel.spec_for(cache.lengths.shape, "batch")
    axis_name = "sp" if parallel.present("sp") else None

    def local(q, q_sinks, k, v, k_caches, v_caches, lengths, layer):
        slots = _slots(lengths, new, k_caches.shape[2], axis_name, parallel)
        single = new == 1 and lengths.shape[0] == 1 and axis_name is None
        write = _written_one if single else _written
        k_caches, v_caches = (write(*pair, layer, slots) for pair in ((k_caches, k), (v_caches, v)))
        out, _ = cached_attention(
            q, *parallel.own_heads(kv_heads, k_caches, v_caches), layer, lengths=lengths + new, axis_name=axis_name,
            window=window, softcap=softcap, layout=parallel.layout, backend=parallel.backend, sinks=sinks,
            q_sinks=q_sinks,
        )  # fmt: skip
        return out.astype(q.dtype), k_caches, v_caches

    sink_queries = None if q_sinks is None else queries
    in_specs = (queries, sink_queries, news, news, caches, caches, rows, P())
    attend = parallel.local(local, in_specs, (queries, caches, caches))
    out, k, v = attend(q, q_sinks, k, v, cache.k, cache.v, cache.lengths, layer)
    return out, cache._replace(k=k, v=v)


def _written(caches, x, layer, slots: Int[Array, "B T"]):
    """The caches with `x` `[B, T, K, H]` in one layer's slots, but for those past the end."""
    row = jnp.arange(x.shape[0])[:, None]
    return caches.at[layer, row, slots].set(x.astype(caches.dtype), mode="drop", unique_indices=True)


def _written_one(caches, x, layer, slots: Int[Array, "1 1"]):
    """The same for one token that has room: nothing is checked, which would be three programs on a GPU for one."""
    return lax.dynamic_update_slice(caches, x[None].astype(caches.dtype), (layer, 0, slots[0, 0], 0, 0))


def _slots(lengths, new: int, capacity: int, axis_name: str | None, parallel: Parallel) -> Int[Array, "B T"]:
    """The slot of each new token in this device's shard; past the end where it lives on another device."""
    index = lengths[:, None] + jnp.arange(new, dtype=jnp.int32)
    shard = lax.axis_index(axis_name) if axis_name else 0
    order, ring_size = layouts.get(parallel.layout), parallel.ring_size
    slot, after = (order.slots_below(x, shard, ring_size, capacity) for x in (index, index + 1))
    return jnp.where(after > slot, slot, capacity)
