"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), exact for positions of many millions.

Pair i of a head turns by `position · f_i`, with `f_i = theta^(−2i/H)`, interleaved as in LWM and LLaMA's own code:
pair i is the components 2i and 2i+1.

    (x_2i, x_2i+1)  ->  (x_2i cos − x_2i+1 sin,  x_2i+1 cos + x_2i sin)

A float32 cannot hold the angle: at position 1,048,575 the fastest pair has turned 166,886 times, and rounding the angle
moves the cosine by up to 0.03. But only the part of a turn counts. So the frequencies are computed in float64 on the
host, in turns per token, and kept as fixed-point fractions of a turn; integer products of positions and fractions
wrap around exactly where a turn does. No table has the length of the sequence.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ringjax.models.config import RopeScaling

_TURN_BITS, _EXTRA_BITS = 32, 16


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """Radians per token of the H/2 pairs, float64, and the factor on cosines and sines (1 except for yarn)."""
    plain = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain, 1.0
    rules = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
    factor = _attention_factor(scaling) if scaling.kind == "yarn" else 1.0
    return rules[scaling.kind](plain, theta, scaling), factor


def rotations(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]:
    """Cosine and sine of every pair at every position, float32, within 3e-7 of the float64 values to position 2²⁰."""
    radians, factor = frequencies(head_dim, theta, scaling)
    angle = _part_of_turn(jnp.asarray(positions, jnp.int32)[..., None], radians / (2 * math.pi)) * (2 * math.pi)
    return jnp.cos(angle) * jnp.float32(factor), jnp.sin(angle) * jnp.float32(factor)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H/2"], sin: Float[Array, "B T H/2"]
) -> Float[Array, "B T N H"]:
    """Turns every pair (2i, 2i+1) of every head; computed in float32, returned in x's type."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    pairs = x.astype(wide).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _part_of_turn(positions: Int[Array, "B T 1"], turns_per_token: np.ndarray) -> Float[Array, "B T P"]:
    """`positions · turns_per_token` less whole turns, in [−½, ½), float32.

        fraction = high · 2⁻³² + low · 2⁻⁴⁸                           high: 32 bits, low: 16 bits
        position · fraction · 2³² = position · high + (position · low) / 2¹⁶        modulo 2³² = modulo a turn

    The fraction's 48 bits err by 2⁻⁴⁹ a token: 2⁻²⁹ of a turn at a million.
    """
    fraction = np.round((turns_per_token % 1.0) * 2.0 ** (_TURN_BITS + _EXTRA_BITS)).astype(np.uint64)
    high = jnp.asarray((fraction >> np.uint64(_EXTRA_BITS)).astype(np.uint32))
    low = jnp.asarray((fraction & np.uint64(2**_EXTRA_BITS - 1)).astype(np.uint32))
    position = positions.astype(jnp.uint32)
    upper, lower = position >> _EXTRA_BITS, position & jnp.uint32(2**_EXTRA_BITS - 1)
    turn = position * high + upper * low + ((lower * low) >> _EXTRA_BITS)
    return turn.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-_TURN_BITS)


def _linear(plain: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Every position divided by `factor`: arXiv:2306.15595."""
    return plain / scaling.factor


def _llama3(plain: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths divided by `factor`, short ones kept, a blend by turns per context in between (Llama 3.1)."""
    turns = scaling.original_max_position * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blend(plain, np.clip(kept, 0.0, 1.0), scaling.factor)


def _yarn(plain: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Blend by the pair's index between those that turn `beta_fast` and `beta_slow` times: arXiv:2309.00071, §3.2."""
    pairs = len(plain)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(scaling.original_max_position / (times * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first if last != first else 0.001  # as published: no division by zero
    kept = 1.0 - np.clip((np.arange(pairs) - first) / width, 0.0, 1.0)
    return _blend(plain, kept, scaling.factor)


def _blend(plain: np.ndarray, kept: np.ndarray, factor: float) -> np.ndarray:
    return plain * kept + plain / factor * (1.0 - kept)


def _attention_factor(scaling: RopeScaling) -> float:
    """YaRN's temperature, put on cosines and sines: 0.1 · ln(factor) + 1, or a quotient of two such terms."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is not None:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, slope: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0
