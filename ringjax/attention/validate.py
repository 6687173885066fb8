"""What a caller can get wrong, said in one line when a function is traced."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ringjax.attention.kernels.base import Score


def arrays(q, k, v, k_name: str = "k", v_name: str = "v") -> None:
    """Raises ValueError unless q is `[B, T, N, H]`, k `[B, S, K, H]`, v `[B, S, K, Hv]` of one float type, K | N."""
    for name, x, axes in (("q", q, "[B, T, N, H]"), (k_name, k, "[B, S, K, H]"), (v_name, v, "[B, S, K, Hv]")):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; it must be {axes}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has type {x.dtype}; attention takes floating-point arrays")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}; an axis is empty")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, {k_name} and {v_name} have types {q.dtype}, {k.dtype} and {v.dtype}; cast them to one")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{k_name} {k.shape} and {v_name} {v.shape} must agree in batch, length and heads")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]} and {k_name} has batch {k.shape[0]}; they must be equal")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head size {q.shape[3]} and {k_name} has {k.shape[3]}; they must be equal")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads; each serves a group of N/K queries"
        )
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        _refuse_nan(name, x)


def score(scale: float | None, softcap: float | None, head_dim: int) -> Score:
    """The score function; raises ValueError for a scale or softcap that is not a finite (positive) number."""
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and (not isinstance(value, (int, float, np.number)) or not math.isfinite(value)):
            raise ValueError(f"{name} {value!r} must be a finite Python number")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap {softcap} must be positive; leave it out for none")
    return Score(float(scale), None if softcap is None else float(softcap))


def queries_fit(length: int, keys: int) -> None:
    """Raises ValueError when there are more queries than keys: the queries are the last of the positions."""
    if length > keys:
        raise ValueError(
            f"{length} queries and {keys} keys: without a reach the queries are the last T of the S positions, "
            "so T cannot exceed S; pass reach= to say what each query sees"
        )


def _refuse_nan(name: str, x) -> None:
    """With `jax_debug_nans` on, names the input that holds a NaN, rather than the operation that met it."""
    if not jax.config.jax_debug_nans:
        return

    def check(values) -> None:
        bad = np.argwhere(np.isnan(np.asarray(values, np.float32)))
        if len(bad):
            raise FloatingPointError(f"{name} holds {len(bad)} NaN, the first at index {tuple(map(int, bad[0]))}")

    if isinstance(x, jax.core.Tracer):
        jax.debug.callback(check, x)
    else:
        check(x)
