"""SwiGLU, and its blockwise form that never holds the inner activations of more than a few tokens."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ringjax.models.config import ModelConfig
from ringjax.models.layers import Linear
from ringjax.models.parallel import Parallel

_UP, _DOWN = ("embed", "ffn"), ("ffn", "embed")


class FeedForward(nnx.Module):
    """`w2(silu(w1 x) · w3 x)` (Shazeer 2020, arXiv:2002.05202); with `ffn_chunk`, blockwise."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.chunk = config.ffn_chunk
        self.w1 = Linear(config.width, config.ffn_width, _UP, config, rngs)
        self.w2 = Linear(config.ffn_width, config.width, _DOWN, config, rngs)
        self.w3 = Linear(config.width, config.ffn_width, _UP, config, rngs)

    def __call__(self, x: Float[Array, "B T D"], parallel: Parallel) -> Float[Array, "B T D"]:
        if self.chunk is not None:
            weights = self.w1.whole, self.w2.whole, self.w3.whole
            return blockwise_feed_forward(x, *weights, self.chunk, parallel)
        gate, up = checkpoint_name(self.w1(x, parallel), "ffn_gate"), checkpoint_name(self.w3(x, parallel), "ffn_up")
        return self.w2(jax.nn.silu(gate) * up, parallel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise_feed_forward(
    x: Float[Array, "B T D"],
    w1: Float[Array, "D F"],
    w2: Float[Array, "F D"],
    w3: Float[Array, "D F"],
    chunk: int,
    parallel: Parallel,
) -> Float[Array, "B T D"]:
    """SwiGLU of `chunk` tokens of each device at a time (Liu & Abbeel 2023, arXiv:2305.19370).

    Only x is kept for the backward pass, which makes each chunk's inner activations again and sums the weights'
    gradients in float32 over the chunks before a single sum over devices.
    """
    return _forward(x, w1, w2, w3, chunk, parallel)[0]


def _forward(x, w1, w2, w3, chunk: int, parallel: Parallel):
    tokens, up, down = _specs_for(x, w1, w2, parallel)

    def local(x, w1, w2, w3):
        w1, w2, w3 = _gather(w1, w2, w3, up, down, x.dtype, parallel)
        blocks, count = _cut(x, chunk)
        y = lax.map(lambda block: (jax.nn.silu(block @ w1) * (block @ w3)) @ w2, blocks)
        return parallel.sum_over(_join(y, count).reshape(x.shape), "tp")

    y = parallel.local(local, (tokens, up, down, up), tokens)(x, w1, w2, w3)
    return y, (x, w1, w2, w3)


def _backward(chunk: int, parallel: Parallel, residuals, dy):
    x, w1, w2, w3 = residuals
    tokens, up, down = _specs_for(x, w1, w2, parallel)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def local(x, dy, w1, w2, w3):
        gathered = _gather(w1, w2, w3, up, down, x.dtype, parallel)
        totals = tuple(jnp.zeros(w.shape, wide) for w in gathered)
        step = functools.partial(_block_gradients, *gathered)
        (blocks, count), (dblocks, _) = _cut(x, chunk), _cut(dy, chunk)
        (dw1, dw2, dw3), dx = lax.scan(step, totals, (blocks, dblocks))
        dx = parallel.sum_over(_join(dx, count).reshape(x.shape), "tp")
        return dx, *(parallel.reduce_weight(dw, spec) for dw, spec in ((dw1, up), (dw2, down), (dw3, up)))

    dx, *dws = parallel.local(local, (tokens, tokens, up, down, up), (tokens, up, down, up))(x, dy, w1, w2, w3)
    return dx, *(dw.astype(w.dtype) for dw, w in zip(dws, (w1, w2, w3)))


blockwise_feed_forward.defvjp(_forward, _backward)


def _block_gradients(w1, w2, w3, totals, block):
    """Adds one block's gradients to the weights' `totals`; gives the block's dx."""
    x, dy = block
    a, b = x @ w1, x @ w3
    gate, gate_vjp = jax.vjp(jax.nn.silu, a)
    dh = dy @ w2.T
    (da,) = gate_vjp(dh * b)
    db = dh * gate
    dw1, dw2, dw3 = (
        total + jnp.einsum("ti,to->io", inputs, outputs, preferred_element_type=total.dtype)
        for total, inputs, outputs in zip(totals, (x, gate * b, x), (da, dy, db))
    )
    return (dw1, dw2, dw3), da @ w1.T + db @ w3.T


def _specs_for(x, w1, w2, parallel: Parallel) -> tuple[P, P, P]:
    return (
        parallel.spec_for(x.shape, "batch", "sequence", None),
        parallel.param_spec(w1.shape, _UP),
        parallel.param_spec(w2.shape, _DOWN),
    )


def _gather(w1, w2, w3, up: P, down: P, dtype, parallel: Parallel):
    return tuple(parallel.gather_weight(w, spec, dtype) for w, spec in ((w1, up), (w2, down), (w3, up)))


def _cut(x: Float[Array, "B T D"], chunk: int) -> tuple[Float[Array, "blocks chunk D"], int]:
    """The local tokens in blocks, the last padded with zeros (which add nothing to any gradient), and their count."""
    flat = x.reshape(-1, x.shape[-1])
    count = flat.shape[0]
    blocks = -(-count // chunk)
    chunk = -(-count // blocks)
    return jnp.pad(flat, ((0, blocks * chunk - count), (0, 0))).reshape(blocks, chunk, -1), count


def _join(blocks: Float[Array, "blocks chunk D"], count: int) -> Float[Array, "tokens D"]:
    return blocks.reshape(-1, blocks.shape[-1])[:count]
