"""The one gradient rule of all distributed attention."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ringjax.attention.kernels.base import Gradients, Kernels, Score, accumulator
from ringjax.attention.merge import Partial


class Strategy(Protocol):
    """How queries and keys that live on different devices meet. Arrays are the local shards."""

    def forward(self, kernels: Kernels, score: Score, q, k, v, start, stop) -> Partial: ...

    def backward(self, kernels: Kernels, score: Score, q, k, v, out, lse, dout, delta, start, stop) -> Gradients: ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def attend(
    strategy: Strategy,
    kernels: Kernels,
    score: Score,
    differentiable_lse: bool,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention of each query over the global interval `start … stop − 1`: out in q's type, lse in float32.

    Both are differentiable, lse only if `differentiable_lse`: some kernels have no gradient of it. What is kept
    for the backward pass is linear in the length: the inputs, out and lse. The last two are named "attention_out"
    and "attention_lse" for `jax.checkpoint` policies; one that saves them never repeats the attention.
    """
    return _attend(strategy, kernels, score, q, k, v, start, stop)


def _attend(strategy, kernels, score, q, k, v, start, stop):
    out, lse = strategy.forward(kernels, score, q, k, v, start, stop)
    return out.astype(q.dtype), lse


def _forward(strategy, kernels, score, differentiable_lse, q, k, v, start, stop):
    # The intervals know no parameter, so `jax.checkpoint` around a layer would compute what follows from them alone
    # once, for all hops, and keep it: with the branches of a hop that is N numbers a token of the WHOLE sequence on
    # every device (13 GB at 32M tokens and 32 heads, jax 0.10.2). Tied to q it belongs to the hop.
    start, stop, _ = lax.optimization_barrier((start, stop, q))
    out, lse = _attend(strategy, kernels, score, q, k, v, start, stop)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, out, lse, start, stop)


def _backward(strategy, kernels, score, differentiable_lse, residuals, cotangents):
    # Without the barrier XLA sees that unrolled hops receive the same K and V as in the forward pass, and keeps
    # all R shards alive between the two rather than send them again.
    q, k, v, out, lse, start, stop = lax.optimization_barrier(residuals)
    dout, dlse = cotangents
    dtype = accumulator(q, k, v)
    rows = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1)
    delta = rearrange(rows, "b t n -> b n t")
    if differentiable_lse:
        delta, kernels = delta - dlse, kernels.with_gradient_of_lse()
    grads = strategy.backward(kernels, score, q, k, v, out, lse, dout, delta, start, stop)
    return grads.dq.astype(q.dtype), grads.dk.astype(k.dtype), grads.dv.astype(v.dtype), None, None


attend.defvjp(_forward, _backward)
