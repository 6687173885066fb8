"""Inputs and masks that the attention tests share."""

import jax
import jax.numpy as jnp
import numpy as np

import ringjax as rj
from tests.attention import oracle

HEADS = {"mha": (8, 8), "gqa": (8, 2), "mqa": (8, 1)}


def masks(batch: int, length: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`behind` and `ahead` int32 `[B, T]` of every kind of mask, in ascending global order."""
    g = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    zero = np.zeros_like(g)
    ends = np.sort(np.random.default_rng(3).choice(np.arange(2, length - 2), (batch, 3), replace=False), axis=1)
    begins = np.stack([np.concatenate([[0], row])[np.searchsorted(row, g[0], side="right")] for row in ends])
    position = (g - begins).astype(np.int32)
    image = (position >= 3) & (position < 9)
    blind = (g % 5 == 2) | (g < 4)
    return {
        "causal": (g, zero),
        "packed": (position, zero),
        "window": (np.minimum(g, 6), zero),
        "packed+window": (np.minimum(position, 6), zero),
        "image spans": (position, _left_in_span(image)),
        "full": (g, length - 1 - g),
        "sees nothing": (np.where(blind, -1, position), zero),
    }


def _left_in_span(inside: np.ndarray) -> np.ndarray:
    left = np.zeros(inside.shape, np.int32)
    for t in range(inside.shape[1] - 2, -1, -1):
        left[:, t] = np.where(inside[:, t] & inside[:, t + 1], left[:, t + 1] + 1, 0)
    return left


def inputs(batch, length, heads, kv_heads, head_dim, v_dim, dtype=jnp.float32, keys=None, seed=0):
    """q, k, v and the cotangents of out and lse, rounded to `dtype` (the last to float32)."""
    draw = np.random.default_rng(seed).standard_normal
    keys = length if keys is None else keys
    shapes = (batch, length, heads, head_dim), (batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, v_dim)
    q, k, v = (jnp.asarray(draw(shape), dtype) for shape in shapes)
    dout = jnp.asarray(draw((batch, length, heads, v_dim)), dtype)
    return q, k, v, dout, jnp.asarray(draw((batch, heads, length)), jnp.float32)


def results(attend, q, k, v, dout, dlse) -> oracle.Results:
    """out, lse and all gradients of `attend(q, k, v) -> (out, lse)` for cotangents dout and dlse."""
    (out, lse), pull = jax.vjp(attend, q, k, v)
    return oracle.Results(out, lse, *pull((dout, jnp.where(jnp.isneginf(lse), 0, dlse))))


def expected(q, k, v, dout, dlse, behind, ahead, **options) -> oracle.Results:
    g = np.arange(q.shape[1])
    start, stop = g - behind, g + ahead + 1
    dlse = np.where((np.maximum(start, 0) < np.minimum(stop, k.shape[1]))[:, None], dlse, 0)
    return oracle.attention(q, k, v, start, stop, dout, dlse, **options)


def mesh(ring_size: int, **others: int) -> jax.sharding.Mesh:
    """A mesh of the simulated devices with a ring of `ring_size` along 'sp'."""
    axes = {**others, "sp": ring_size}
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes))


def sharded(layout: str, ring_size: int, **options):
    """`attend(q, k, v, behind, ahead) -> (out, lse)` over a ring, on arrays in ascending global order."""
    order = rj.layouts.get(layout)
    place = mesh(ring_size)

    def attend(q, k, v, behind, ahead):
        reach = rj.Reach(behind, ahead).permute(layout, ring_size)
        q, k, v = (order.permute(x, ring_size, 1) for x in (q, k, v))
        out, lse = rj.sharded_attention(q, k, v, mesh=place, layout=layout, reach=reach, return_lse=True, **options)
        return order.restore(out, ring_size, 1), order.restore(lse, ring_size, 2)

    return attend
