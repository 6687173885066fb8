"""Attention and its gradients in NumPy float64, by the formulas of a textbook, and the tolerances of all tests."""

from typing import NamedTuple

import numpy as np
from einops import rearrange, reduce, repeat

# How far a result may be from the float64 oracle, as ‖x − oracle‖ / ‖oracle‖.
#
# | type     | what                | bound       | reason                                                            |
# | -------- | ------------------- | ----------- | ----------------------------------------------------------------- |
# | float32  | out, lse, gradients | 1e-5        | about 100 roundings of 6e-8 at the lengths tested; a wrong mask   |
# |          |                     |             | or a missing hop is off by 1e-2 or more                           |
# | bfloat16 | out, lse            | 2 × plain   | what the plain formula loses on one device in the same type: the  |
# |          |                     |             | ring merges in float32, so it may add one rounding of the output  |
# | bfloat16 | dq, dk, dv          | 3 × plain   | p and ds are rounded to bfloat16 block by block, sums are float32 |
FLOAT32 = 1e-5
BFLOAT16_OUT = 2.0
BFLOAT16_GRAD = 3.0


class Results(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def attention(q, k, v, start, stop, dout, dlse, scale=None, softcap=None) -> Results:
    """All of attention's results for queries that see the keys `start … stop − 1` (`[B, T]`)."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    copies = q.shape[2] // k.shape[2]
    wide_k, wide_v = (repeat(x, "b s k h -> b s (k g) h", g=copies) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = np.einsum("btnh,bsnh->bnts", q, wide_k) * scale
    slope = np.full_like(s, scale)
    if softcap is not None:
        slope *= 1 - np.tanh(s / softcap) ** 2
        s = softcap * np.tanh(s / softcap)
    key = np.arange(k.shape[1])
    start, stop = (rearrange(np.asarray(x), "b t -> b 1 t 1") for x in (start, stop))
    s = np.where((key >= start) & (key < stop), s, -np.inf)
    with np.errstate(divide="ignore"):
        peak = np.where(np.isneginf(s.max(-1)), 0, s.max(-1))
        lse = peak + np.log(np.exp(s - peak[..., None]).sum(-1))
    p = np.where(np.isneginf(s), 0, np.exp(s - np.where(np.isneginf(lse), 0, lse)[..., None]))
    out = np.einsum("bnts,bsnh->btnh", p, wide_v)
    dp = np.einsum("btnh,bsnh->bnts", dout, wide_v)
    delta = np.einsum("btnh,btnh->bnt", dout, out) - dlse
    ds = p * (dp - delta[..., None]) * slope
    sum_group = lambda x: reduce(x, "b s (k g) h -> b s k h", "sum", g=copies)  # noqa: E731
    return Results(
        out,
        lse,
        np.einsum("bnts,bsnh->btnh", ds, wide_k),
        sum_group(np.einsum("bnts,btnh->bsnh", ds, q)),
        sum_group(np.einsum("bnts,btnh->bsnh", p, dout)),
    )


def error(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖ over the finite entries; infinities must agree exactly, NaN never passes."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    finite = np.isfinite(expected)
    if not (np.array_equal(found[~finite], expected[~finite]) and np.isfinite(found[finite]).all()):
        return np.inf
    norm = np.linalg.norm(expected[finite])
    return float(np.linalg.norm(found[finite] - expected[finite]) / (norm if norm else 1.0))


def errors(found: Results, expected: Results) -> Results:
    return Results(*(error(a, b) for a, b in zip(found, expected, strict=True)))
