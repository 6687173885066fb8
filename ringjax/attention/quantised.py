"""A cache of int8 numbers: half the memory of bfloat16, one scale for each token and head.

    x ≈ scale · number,   scale = max |x| / 127

Scores and weights are multiplied by the scales, so that K and V themselves are read as int8 and multiplied as they are.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from ringjax.attention.kernels.base import Score, product
from ringjax.attention.kernels.reference import exponentials
from ringjax.attention.merge import Partial

LARGEST = 127


def quantise(x: Float[Array, "... H"]) -> tuple[Int[Array, "... H"], Float[Array, "..."]]:
    """Numbers and scales; what is 0 stays 0."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    numbers = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return numbers.astype(jnp.int8), scale


def dequantise(numbers: Int[Array, "... H"], scale: Float[Array, "..."], dtype) -> Float[Array, "... H"]:
    """What `quantise` was given, to half a step."""
    return (numbers.astype(jnp.float32) * scale[..., None]).astype(dtype)


def forward(
    q: Float[Array, "B T N H"],
    k: Int[Array, "B S K H"],
    v: Int[Array, "B S K H"],
    k_scale: Float[Array, "B S K"],
    v_scale: Float[Array, "B S K"],
    lo: Int[Array, "B T"],
    hi: Int[Array, "B T"],
    score: Score,
) -> Partial:
    """As `kernels.reference.forward`, of a few queries: all their scores are held at once, in float32."""
    grouped = rearrange(q, "b t (k g) h -> b t k g h", k=k.shape[2])
    per_key = lambda scale: rearrange(scale, "b s k -> b k 1 1 s")  # noqa: E731
    scores = score(product("btkgh,bskh->bkgts", grouped, k.astype(q.dtype)) * per_key(k_scale))
    slot = jnp.arange(k.shape[1], dtype=jnp.int32)
    lo, hi = (rearrange(x, "b t -> b 1 1 t 1") for x in (lo, hi))
    visible = (slot >= lo) & (slot < hi)
    weights, total, lse = exponentials(scores, visible)
    weights = weights * per_key(v_scale) / total[..., None]
    out = product("bkgts,bskh->btkgh", weights.astype(q.dtype), v.astype(q.dtype))
    return Partial(rearrange(out, "b t k g h -> b t (k g) h"), rearrange(lse, "b k g t -> b (k g) t"))


def layer_of(caches: tuple[jax.Array, ...], layer, dtype) -> tuple[Array, Array]:
    """K and V of one layer, in `dtype`, from numbers and scales."""
    k, v, k_scale, v_scale = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in caches)
    return dequantise(k, k_scale, dtype), dequantise(v, v_scale, dtype)
