"""Finite scalar quantization: each latent dimension is rounded to a few levels, and their grid is the codebook.

    bounded = tanh(z + shift) · half − offset        level = round(bounded)        entry = level / (L // 2)
    code    = Σ_d (level_d + L_d // 2) · Π_{c<d} L_c

Nothing is learned, so nothing can die. Mentzer et al. 2023, arXiv:2309.15505, appendix A.1.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_EDGE = 1e-3  # the outermost levels are reached without tanh being ±1


def bound(latents: Float[Array, "*n D"], levels: Sequence[int]) -> Float[Array, "*n D"]:
    """Latents squeezed so that rounding gives exactly `levels[d]` values: −2 … 1 for 4, −2 … 2 for 5."""
    count = np.asarray(levels, np.float64)
    half = (count - 1) * (1 - _EDGE) / 2
    offset = np.where(count % 2 == 1, 0.0, 0.5)
    shift = np.tan(offset / half)
    as_float = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    return jnp.tanh(latents.astype(jnp.float32) + as_float(shift)) * as_float(half) - as_float(offset)


def scalar_entries(codes: Int[Array, "*n"], levels: Sequence[int]) -> Float[Array, "*n D"]:
    """The point of the grid that each code stands for, in [−1, 1]."""
    half_width = np.asarray(levels) // 2
    steps = codes[..., None] // jnp.asarray(_strides(levels), jnp.int32) % jnp.asarray(levels, jnp.int32)
    return (steps - half_width).astype(jnp.float32) / jnp.asarray(half_width, jnp.float32)


def scalar_codes(bounded: Float[Array, "*n D"], levels: Sequence[int]) -> Int[Array, "*n"]:
    """The code of the level that each bounded latent is nearest to."""
    steps = jnp.round(bounded).astype(jnp.int32) + jnp.asarray(np.asarray(levels) // 2, jnp.int32)
    return jnp.sum(steps * jnp.asarray(_strides(levels), jnp.int32), axis=-1, dtype=jnp.int32)


def _strides(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:d]) for d in range(len(levels))]
