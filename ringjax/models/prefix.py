"""A prefix that all rows begin with: its keys and values exist once, and are read once for all rows.

    attention(q, prefix + own) = merge(attention(q, prefix), attention(q, own))

The queries of all rows are one long row to the prefix (Hydragen; Juravsky et al. 2024, arXiv:2402.05099), which stays
cut over the ring as the prefill left it: every device attends to its own part, and the parts are merged.
"""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ringjax.attention import kernels, layouts, validate
from ringjax.attention.decode import FEW
from ringjax.attention.merge import Partial, merge, merge_across
from ringjax.models.cache import KVCache
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel


class Prefix(NamedTuple):
    """Keys and values of a prefix of `length` tokens, for one layer or (with a leading axis) for all."""

    k: Float[Array, "*layers 1 S K H"]
    v: Float[Array, "*layers 1 S K H"]
    length: Int[Array, "*layers"]

    @classmethod
    def of(cls, cache: KVCache, config: ModelConfig) -> "Prefix":
        """The first row of a cache. Raises NotImplementedError where not every token sees the whole prefix."""
        if config.window is not None:
            raise NotImplementedError(f"a shared prefix and window {config.window}: later tokens see a part of it only")
        if cache.k_scale is not None:
            raise NotImplementedError("a shared prefix in an int8 cache; leave cache_type out for the prefix")
        return cls(cache.k[:, :1], cache.v[:, :1], jnp.broadcast_to(cache.lengths[0], (config.layers,)))

    def layer(self, index: Int[Array, ""]) -> "Prefix":
        """That of one layer."""
        return Prefix(*(lax.dynamic_index_in_dim(x, index, keepdims=False) for x in self))


def with_prefix(
    attended: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    q: Float[Array, "B T N H"],
    prefix: Prefix,
    *,
    softcap: float | None,
    parallel: Parallel,
) -> Float[Array, "B T N H"]:
    """Attention to a row's own tokens, `attended` and `lse`, merged with that to the prefix of one layer."""
    queries = parallel.spec_for(q.shape, "batch", None, "heads", None)
    keys = parallel.spec_for(prefix.k.shape, None, "sequence", "kv_heads", None)
    sums = parallel.spec_for(lse.shape, "batch", "heads", None)
    order, ring_size, kv_heads = layouts.get(parallel.layout), parallel.ring_size, prefix.k.shape[2]
    score = validate.score(None, softcap, q.shape[-1])
    backend = "reference" if q.shape[0] * q.shape[1] <= FEW else parallel.backend

    def local(q, k, v, length):
        rows = q.shape[0]
        k, v = parallel.own_heads(kv_heads, k, v)
        one_row = rearrange(q, "b t n h -> 1 (b t) n h")
        shard = lax.axis_index("sp") if parallel.present("sp") else 0
        hi = jnp.full(one_row.shape[:2], order.slots_below(length, shard, ring_size, k.shape[1]), jnp.int32)
        kernel = kernels.choose(backend, one_row, k, v, score).interval
        part = Partial(*kernel.forward(one_row, k, v, jnp.zeros_like(hi), hi, score))
        if parallel.present("sp"):
            part = merge_across(part, "sp")
        return Partial(
            rearrange(part.out, "1 (b t) n h -> b t n h", b=rows), rearrange(part.lse, "1 n (b t) -> b n t", b=rows)
        )

    seen = parallel.local(local, (queries, keys, keys, P()), Partial(queries, sums))(q, *prefix)
    return merge(Partial(attended, lse), seen).out.astype(attended.dtype)
