"""Dense attention by the plain formula: the specification that every other kernel is tested against.

In float64 it is the oracle. It holds all scores at once, so it is for small inputs and for a few queries.
"""

import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Bool, Float, Int

from ringjax.attention.kernels.base import Gradients, Kernel, Score, product
from ringjax.attention.merge import Partial


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    lo: Int[Array, "B T"],
    hi: Int[Array, "B T"],
    score: Score,
) -> Partial:
    """Attention of each query over the keys `lo … hi − 1`.

        s = score(q · k);  lse = log Σ exp(s);  out = Σ exp(s − lse) v
    """
    scores, visible = _scores(q, k, lo, hi, score)
    weights, total, lse = exponentials(scores, visible)
    summed = product("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    out = summed / rearrange(total, "b k g t -> b t k g 1")
    return Partial(rearrange(out, "b t k g h -> b t (k g) h"), rearrange(lse, "b k g t -> b (k g) t"))


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B N T"],
    dout: Float[Array, "B T N Hv"],
    delta: Float[Array, "B N T"],
    lo: Int[Array, "B T"],
    hi: Int[Array, "B T"],
    score: Score,
) -> Gradients:
    """Gradients through the keys of this call, given the lse and delta of all keys.

        p = exp(s − lse);  dv = pᵀ dout;  ds = p (dout · v − delta);  dq = ds k;  dk = dsᵀ q
    """
    del out  # delta holds all that is needed of it
    groups = k.shape[2]
    scores, visible = _scores(q, k, lo, hi, score)
    lse, delta = (rearrange(x, "b (k g) t -> b k g t 1", k=groups) for x in (lse, delta))
    p = jnp.where(visible, jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0, lse)), 0)
    dout, q = (rearrange(x, "b t (k g) h -> b t k g h", k=groups) for x in (dout, q))
    ds = p * (product("btkgh,bskh->bkgts", dout, v) - delta) * score.gradient(scores)
    ds = ds.astype(q.dtype)
    return Gradients(
        rearrange(product("bkgts,bskh->btkgh", ds, k), "b t k g h -> b t (k g) h"),
        product("bkgts,btkgh->bskh", ds, q),
        product("bkgts,btkgh->bskh", p.astype(dout.dtype), dout),
    )


def exponentials(scores: Float[Array, "*rows S"], visible: Bool[Array, "*rows S"]):
    """Of the visible scores less their largest, 0 for the others; their sum (1 where nothing is seen); and the lse."""
    peak = jnp.max(scores, axis=-1, initial=jnp.finfo(scores.dtype).min, where=visible)
    weights = jnp.where(visible, jnp.exp(scores - peak[..., None]), 0)
    total = weights.sum(-1)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    return weights, total, jnp.where(seen, peak + jnp.log(total), -jnp.inf)


def _scores(q, k, lo, hi, score: Score) -> tuple[Float[Array, "B K G T S"], Bool[Array, "B 1 1 T S"]]:
    grouped = rearrange(q, "b t (k g) h -> b t k g h", k=k.shape[2])
    slot = jnp.arange(k.shape[1], dtype=jnp.int32)
    lo, hi = (rearrange(x, "b t -> b 1 1 t 1") for x in (lo, hi))
    return score(product("btkgh,bskh->bkgts", grouped, k)), (slot >= lo) & (slot < hi)


def visible_pairs(lo: Int[Array, "B T"], hi: Int[Array, "B T"]) -> Int[Array, " B"]:
    """How many (query, key) pairs the intervals hold: the useful work of a call."""
    return reduce(jnp.maximum(hi - lo, 0), "b t -> b", "sum")


KERNEL = Kernel("reference", forward, backward)
