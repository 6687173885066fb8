"""Partial attention results and the one rule that combines them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention over some of the keys: the normalised output and the log-sum-exp of the scores.

    A query that saw no key has out 0 and lse −inf.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B N T"]


def empty(batch: int, length: int, heads: int, head_dim: int, dtype=jnp.float32) -> Partial:
    """Attention over no key, `(0, −inf)`: the neutral element of `merge`."""
    return Partial(
        jnp.zeros((batch, length, heads, head_dim), dtype), jnp.full((batch, heads, length), -jnp.inf, dtype)
    )


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over two disjoint sets of keys, from attention over each.

        lse = log(exp(lse_a) + exp(lse_b))
        out = out_a · exp(lse_a − lse) + out_b · exp(lse_b − lse)

    Associative and commutative; (0, −inf) is neutral, so an empty hop needs no special case. `a` and `b`
    are `(out [B, T, N, H], lse [B, N, T])`; the result is float32 (float64 for float64 inputs) whatever
    the inputs are. Differentiable in all four arrays, also where both lse are −inf.

    Milakov & Gimelshein 2018, arXiv:1805.02867, eq. 3-4.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    dtype = jnp.promote_types(jnp.result_type(out_a, out_b, lse_a, lse_b), jnp.float32)
    lse_a, lse_b = lse_a.astype(dtype), lse_b.astype(dtype)
    peak = _finite(jnp.maximum(lse_a, lse_b))
    weight_a, weight_b = jnp.exp(lse_a - peak), jnp.exp(lse_b - peak)
    total = weight_a + weight_b
    out = out_a.astype(dtype) * _per_query(weight_a) + out_b.astype(dtype) * _per_query(weight_b)
    return Partial(out / _per_query(_nonzero(total)), _log(total, peak))


def merge_along(out: Float[Array, "*rows parts H"], lse: Float[Array, "*rows parts"]) -> Partial:
    """`merge` of all parts along an axis: `(out [*rows, H], lse [*rows])`, in float32 (float64 for float64)."""
    dtype = jnp.promote_types(jnp.result_type(out, lse), jnp.float32)
    lse = lse.astype(dtype)
    peak = _finite(jnp.max(lse, axis=-1))
    weight = jnp.exp(lse - peak[..., None])
    total = weight.sum(-1)
    summed = jnp.sum(out.astype(dtype) * weight[..., None], axis=-2)
    return Partial(summed / _nonzero(total)[..., None], _log(total, peak))


def merge_across(part: Partial, axis_name: str) -> Partial:
    """`merge` of the partial results that the devices along `axis_name` hold, on every device.

    One small reduction whose size does not depend on the number of keys (Flash-Decoding, Tree Attention:
    arXiv:2408.04093). Shapes as in `merge`.
    """
    dtype = jnp.promote_types(part.out.dtype, jnp.float32)
    lse = part.lse.astype(dtype)
    peak = _finite(lax.pmax(lax.stop_gradient(lse), axis_name))
    weight = jnp.exp(lse - peak)
    out, total = lax.psum((part.out.astype(dtype) * _per_query(weight), weight), axis_name)
    return Partial(out / _per_query(_nonzero(total)), _log(total, peak))


def _finite(peak: jax.Array) -> jax.Array:
    """The reference point of the exponentials: any number will do, so −inf becomes 0 and carries no gradient."""
    peak = lax.stop_gradient(peak)
    return jnp.where(jnp.isneginf(peak), jnp.zeros_like(peak), peak)


def _nonzero(total: jax.Array) -> jax.Array:
    return jnp.where(total == 0, jnp.ones_like(total), total)


def _log(total: jax.Array, peak: jax.Array) -> jax.Array:
    return jnp.where(total == 0, -jnp.inf, peak + jnp.log(_nonzero(total)))


def _per_query(weight_BNT: jax.Array) -> jax.Array:
    return rearrange(weight_BNT, "b n t -> b t n 1")
