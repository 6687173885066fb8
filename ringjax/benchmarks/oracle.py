"""Attention of some queries and its gradients in NumPy float64, by the formula, on one row of the batch.

    s_ts = q_t · k_s / √H            start_t ≤ s < stop_t
    p_ts = exp(s_ts) / Σ_s exp(s_ts)
    out_t = Σ_s p_ts v_s
    ds_ts = p_ts (dout_t · v_s − dout_t · out_t) / √H
    dq_t = Σ_s ds_ts k_s      dk_s = Σ_t ds_ts q_t      dv_s = Σ_t p_ts dout_t

It shares no line with what it judges. dk and dv are sums over the given queries: a key's gradient is whole where they
are all the queries that see it.
"""

from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int

# Queries computed together: their scores, T numbers each for every head of a group, are all that is large.
BLOCK = 64


class Results(NamedTuple):
    """Of the given queries; dk and dv are None where gradients were not asked for."""

    out: Float[np.ndarray, "M N H"]
    dq: Float[np.ndarray, "M N H"] | None = None
    dk: Float[np.ndarray, "S K H"] | None = None
    dv: Float[np.ndarray, "S K H"] | None = None


def attention(
    q: Float[np.ndarray, "M N H"],
    k: Float[np.ndarray, "S K H"],
    v: Float[np.ndarray, "S K H"],
    start: Int[np.ndarray, " M"],
    stop: Int[np.ndarray, " M"],
    dout: Float[np.ndarray, "M N H"] | None = None,
) -> Results:
    """Attention of M queries, each over the keys `start … stop − 1`, with gradients where `dout` is given.

    A query that sees nothing gives 0.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    dout = None if dout is None else np.asarray(dout).astype(np.float64)
    start, stop = np.maximum(start, 0), np.minimum(stop, len(k))
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for first in range(0, len(q), BLOCK):
        rows = slice(first, first + BLOCK)
        if not (start[rows] < stop[rows]).any():
            continue
        seen = slice(start[rows].min(), stop[rows].max())
        index = np.arange(seen.start, seen.stop)
        visible = (index >= start[rows, None]) & (index < stop[rows, None])
        for head in range(k.shape[1]):
            group = slice(head * q.shape[1] // k.shape[1], (head + 1) * q.shape[1] // k.shape[1])
            d = None if dout is None else dout[rows, group]
            found = _one_head(q[rows, group], k[seen, head], v[seen, head], visible, d)
            out[rows, group] = found.out
            if d is not None:
                dq[rows, group] = found.dq
                dk[seen, head] += found.dk
                dv[seen, head] += found.dv
    return Results(out) if dout is None else Results(out, dq, dk, dv)


def _one_head(q, k, v, visible, dout) -> Results:
    """One key/value head: q `[M, G, H]`, k and v `[S, H]`, visible `[M, S]`."""
    rows = rearrange(q, "m g h -> (m g) h")
    scale = q.shape[-1] ** -0.5
    scores = rearrange(rows @ k.T * scale, "(m g) s -> m g s", m=len(q))
    scores = np.where(visible[:, None], scores, -np.inf)
    peak = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
    total = p.sum(-1, keepdims=True)
    p = rearrange(p / np.where(total == 0, 1, total), "m g s -> (m g) s")
    out = p @ v
    if dout is None:
        return Results(rearrange(out, "(m g) h -> m g h", m=len(q)))
    dout = rearrange(dout, "m g h -> (m g) h")
    ds = p * (dout @ v.T - (dout * out).sum(-1, keepdims=True)) * scale
    out, dq = (rearrange(x, "(m g) h -> m g h", m=len(q)) for x in (out, ds @ k))
    return Results(out, dq, ds.T @ rows, p.T @ dout)
