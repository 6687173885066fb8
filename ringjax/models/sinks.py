"""Attention sinks: a row's first tokens stay visible beside the window (Xiao et al. 2023, arXiv:2309.17453).

    window 4, sinks 2        token 7 sees   0 1 . . 4 5 6 7      at the distances   5 4 . . 3 2 1 0

Models put much of their attention on the first tokens; without them a window changes every later state. Distances do
not grow beyond those that a cache of `sinks + window` tokens would have: sinks are seen from position
`sinks + window - 1` at most, by a query of its own. What both see is merged by the one rule.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ringjax.attention import validate
from ringjax.attention.kernels import reference
from ringjax.attention.merge import Partial, merge
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel


def sink_positions(positions: Int[Array, "B T"], config: ModelConfig) -> Int[Array, "B T"]:
    """Where queries stand when they look at the sinks."""
    return jnp.minimum(positions, config.sinks + config.window - 1)


def with_sinks(
    attended: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    q_sinks: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    *,
    config: ModelConfig,
    parallel: Parallel,
) -> Float[Array, "B T N H"]:
    """Attention within the window, `attended` and `lse`, merged with that to the sinks, the tokens at the first
    positions of each row; a row is one document."""
    queries = parallel.spec_for(q_sinks.shape, "batch", "sequence", "heads", None)
    keys = parallel.spec_for(k.shape, "batch", "sequence", "kv_heads", None)
    sums = parallel.spec_for(lse.shape, "batch", "heads", "sequence")
    heads = k.shape[2]
    score = validate.score(None, config.softcap, q_sinks.shape[-1])

    def local(out, lse, q, k, v, positions):
        chosen = positions[:, None] == jnp.arange(config.sinks, dtype=positions.dtype)[:, None]
        first = (
            parallel.sum_over(jnp.einsum("bst,btkh->bskh", chosen.astype(x.dtype), x), "sp")
            for x in parallel.own_heads(heads, k, v)
        )
        gone = jnp.clip(positions - config.window + 1, 0, config.sinks)
        seen = reference.forward(q, *first, jnp.zeros_like(gone), gone, score)
        return merge(Partial(out, lse), seen).out.astype(out.dtype)

    in_specs = (queries, sums, queries, keys, keys, parallel.spec_for(positions.shape, "batch", "sequence"))
    return parallel.local(local, in_specs, queries)(attended, lse, q_sinks, k, v, positions)
