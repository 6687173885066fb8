"""A prefix that all rows begin with: its keys and values exist once, and are read once for all rows.

    attention(q, prefix + own) = merge(attention(q, prefix), attention(q, own))

The queries of all rows are one long row to the prefix (Hydragen; Juravsky et al. 2024, arXiv:2402.05099), a cache that
stays cut over the ring as the prefill left it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ringjax.attention import Reach
from ringjax.attention.decode import cached_attention
from ringjax.attention.merge import Partial, merge
from ringjax.models.cache import KVCache
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel


class Prefix(NamedTuple):
    """Keys and values of `length` tokens, of all layers."""

    k: Float[Array, "layers 1 S K H"]
    v: Float[Array, "layers 1 S K H"]
    length: Int[Array, ""]

    @classmethod
    def of(cls, cache: KVCache, config: ModelConfig) -> "Prefix":
        """The first row of a cache. Raises NotImplementedError where not every token sees the whole prefix."""
        if config.window is not None:
            raise NotImplementedError(f"a shared prefix and window {config.window}: later tokens see a part of it only")
        if cache.k_scale is not None:
            raise NotImplementedError("a shared prefix in an int8 cache; leave cache_type out for the prefix")
        return cls(cache.k[:, :1], cache.v[:, :1], cache.lengths[0])


def with_prefix(
    attended: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    q: Float[Array, "B T N H"],
    prefix: Prefix,
    layer: Int[Array, ""],
    *,
    softcap: float | None,
    parallel: Parallel,
) -> Float[Array, "B T N H"]:
    """Attention to a row's own tokens, `attended` and `lse`, merged with that to the prefix in the same layer."""
    queries = parallel.spec_for(q.shape, "batch", None, "heads", None)
    keys = parallel.spec_for(prefix.k.shape, None, None, "sequence", "kv_heads", None)
    sums = parallel.spec_for(lse.shape, "batch", "heads", None)
    axis_name, kv_heads = "sp" if parallel.present("sp") else None, prefix.k.shape[3]

    def local(q, k, v, length, layer):
        rows, one_row = q.shape[0], rearrange(q, "b t n h -> 1 (b t) n h")
        # All of it is visible, wherever a query stands: `reach` counts from where decoding would put it.
        place = (length - one_row.shape[1] + jnp.arange(one_row.shape[1], dtype=jnp.int32))[None]
        out, lse = cached_attention(
            one_row, *parallel.own_heads(kv_heads, k, v), layer, lengths=length[None], axis_name=axis_name,
            reach=Reach(place, length - 1 - place), softcap=softcap, layout=parallel.layout, backend=parallel.backend,
        )  # fmt: skip
        return Partial(
            rearrange(out, "1 (b t) n h -> b t n h", b=rows), rearrange(lse, "1 n (b t) -> b n t", b=rows)
        )

    seen = parallel.local(local, (queries, keys, keys, P(), P()), Partial(queries, sums))(q, *prefix, layer)
    return merge(Partial(attended, lse), seen).out.astype(attended.dtype)
