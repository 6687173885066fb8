"""Keys and values of the tokens so far, kept rotated, possibly cut over the ring in layout order."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from ringjax.attention import layouts
from ringjax.attention.decode import cached_attention
from ringjax.attention.quantised import quantise
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel

_AXES = ("batch", "sequence", "kv_heads", None)

CacheType = Literal["int8"]


class KVCache(NamedTuple):
    """`k` and `v` of every layer, `lengths` tokens of each row; slots at and past a row's length hold anything.

    An int8 cache has a float32 scale for every token and head, by which its numbers are multiplied.
    """

    k: Num[Array, "layers B S K H"]
    v: Num[Array, "layers B S K H"]
    lengths: Int[Array, " B"]
    k_scale: Float[Array, "layers B S K"] | None = None
    v_scale: Float[Array, "layers B S K"] | None = None

    @property
    def capacity(self) -> int:
        """S, the tokens that a row can hold."""
        return self.k.shape[2]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All but the lengths."""
        return (self.k, self.v) if self.k_scale is None else (self.k, self.v, self.k_scale, self.v_scale)

    def with_arrays(self, arrays, lengths: Int[Array, " B"] | None = None) -> "KVCache":
        """The cache with other `arrays` (and `lengths`)."""
        k, v, *scales = arrays
        return KVCache(k, v, self.lengths if lengths is None else lengths, *scales)


def empty_cache(
    config: ModelConfig, rows: int, capacity: int, parallel: Parallel, kind: CacheType | None = None
) -> KVCache:
    """Room for `capacity` tokens of each row, where the mesh has it; `kind` None: in the type of the activations."""
    shape = (config.layers, rows, capacity, config.key_heads, config.head_size)

    def zeros(shape, dtype):
        spec = None if parallel.mesh is None else NamedSharding(parallel.mesh, _spec(shape, parallel))
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=spec)()

    numbers = [zeros(shape, jnp.int8 if kind else config.compute_dtype) for _ in "kv"]
    scales = [zeros(shape[:-1], jnp.float32) for _ in "kv"] if kind else []
    return KVCache(*numbers, jnp.zeros(rows, jnp.int32), *scales)


def filled(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], capacity: int, parallel: Parallel, kind) -> tuple:
    """The arrays of a layer's cache with the keys and values of a prefill."""
    return _as_kept(widen(k, capacity, parallel), widen(v, capacity, parallel), kind)


def _as_kept(k, v, kind: CacheType | None) -> tuple[Array, ...]:
    if kind is None:
        return k, v
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    return k, v, k_scale, v_scale


def _spec(shape: tuple[int, ...], parallel: Parallel) -> P:
    """Of an array of the cache: numbers or scales."""
    return parallel.spec_for(shape, None, *_AXES[: len(shape) - 1])


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


def widen(x: Num[Array, "B T *rest"], capacity: int, parallel: Parallel) -> Num[Array, "B S *rest"]:
    """Keys, values or scales with empty slots after those of each shard, without moving any."""
    batch, length, *rest = x.shape
    ring_size = parallel.ring_size
    shards = x.reshape(batch, ring_size, length // ring_size, *rest)
    empty = (capacity - length) // ring_size
    wide = jnp.pad(shards, [(0, 0), (0, 0), (0, empty), *[(0, 0)] * len(rest)])
    return parallel.constrain(wide.reshape(batch, capacity, *rest), *_AXES[: 2 + len(rest)])


def without(cache: KVCache, first: int, gone: Int[Array, ""], *, parallel: Parallel) -> KVCache:
    """The cache without the `gone` tokens that follow the `first` ones of each row; no token changes its device.

    Both are multiples of the ring size, and the layout is striped where it is above 1.
    """
    ring_size = parallel.ring_size
    specs = tuple(_spec(x.shape, parallel) for x in cache.arrays)

    def local(arrays, gone):
        slot = jnp.arange(arrays[0].shape[2])
        kept = jnp.minimum(slot + gone // ring_size, len(slot) - 1)
        kept = jnp.where(slot < first // ring_size, slot, kept)
        return tuple(jnp.take(x, kept, axis=2) for x in arrays)

    shift = parallel.local(local, (specs, P()), specs)
    return cache.with_arrays(shift(cache.arrays, gone), cache.lengths - gone)


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
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"], KVCache]:
    """Writes a layer's T new tokens after the `lengths` ones of each row and attends to all of them: out and lse.

    The caches do not move, and inside a compiled loop they are changed in place. `lengths` stays. Of several tokens
    those past the capacity are not written; a single one must have room (the caller checks: lengths are data).
    """
    new, kv_heads = q.shape[1], k.shape[2]
    queries = parallel.spec_for(q.shape, "batch", None, "heads", None)
    news = parallel.spec_for(k.shape, "batch", None, "kv_heads", None)
    specs = tuple(_spec(x.shape, parallel) for x in cache.arrays)
    rows = parallel.spec_for(cache.lengths.shape, "batch")
    axis_name = "sp" if parallel.present("sp") else None

    def local(q, q_sinks, k, v, arrays, lengths, layer):
        slots = _slots(lengths, new, arrays[0].shape[2], axis_name, parallel)
        single = new == 1 and lengths.shape[0] == 1 and axis_name is None
        write = _written_one if single else _written
        kept = _as_kept(k, v, "int8" if len(arrays) == 4 else None)
        arrays = tuple(write(cached, x, layer, slots) for cached, x in zip(arrays, kept))
        own_k, own_v = parallel.own_heads(kv_heads, *arrays[:2])
        scales = tuple(x[..., 0] for x in parallel.own_heads(kv_heads, *(x[..., None] for x in arrays[2:])))
        out, lse = cached_attention(
            q, own_k, own_v, layer, lengths=lengths + new, axis_name=axis_name, window=window, softcap=softcap,
            layout=parallel.layout, backend=parallel.backend, sinks=sinks, q_sinks=q_sinks, scales=scales or None,
        )  # fmt: skip
        return out.astype(q.dtype), lse, arrays

    sink_queries = None if q_sinks is None else queries
    sums = P(*(queries[axis] for axis in (0, 2, 1)))
    attend = parallel.local(local, (queries, sink_queries, news, news, specs, rows, P()), (queries, sums, specs))
    out, lse, arrays = attend(q, q_sinks, k, v, cache.arrays, cache.lengths, layer)
    return out, lse, cache.with_arrays(arrays)


def _written(caches, x, layer, slots: Int[Array, "B T"]):
    """The caches with `x` `[B, T, K, H]` in one layer's slots, but for those past the end."""
    row = jnp.arange(x.shape[0])[:, None]
    return caches.at[layer, row, slots].set(x.astype(caches.dtype), mode="drop", unique_indices=True)


def _written_one(caches, x, layer, slots: Int[Array, "1 1"]):
    """The same for one token that has room: nothing is checked, which would be three programs on a GPU for one."""
    at = layer, 0, slots[0, 0], *(0,) * (x.ndim - 2)
    return lax.dynamic_update_slice(caches, x[None].astype(caches.dtype), at)


def _slots(lengths, new: int, capacity: int, axis_name: str | None, parallel: Parallel) -> Int[Array, "B T"]:
    """The slot of each new token in this device's shard; past the end where it lives on another device."""
    index = lengths[:, None] + jnp.arange(new, dtype=jnp.int32)
    shard = lax.axis_index(axis_name) if axis_name else 0
    order, ring_size = layouts.get(parallel.layout), parallel.ring_size
    slot, after = (order.slots_below(x, shard, ring_size, capacity) for x in (index, index + 1))
    return jnp.where(after > slot, slot, capacity)
