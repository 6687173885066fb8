import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.models import RopeScaling
from ringjax.models.rope import frequencies, rotate, rotations
from tests.models import oracle

LLAMA3 = RopeScaling("llama3", 8.0, 8192)
YARN = RopeScaling("yarn", 32.0, 4096)


@pytest.mark.parametrize("theta", [1e4, 5e7])
def test_angles_are_exact_at_a_million(theta):
    positions = np.concatenate([np.arange(300), 2**20 - 1 - np.arange(300), [2**24 + 77]]).astype(np.int32)
    radians, _ = frequencies(128, theta)
    cos, sin = jax.jit(lambda p: rotations(p, 128, theta))(positions[None])
    # The angle in float64 is itself right to 1e-9. A float32 angle would be off by up to 0.03 here.
    angle = positions[:, None].astype(np.float64) * radians
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=4e-7)
    np.testing.assert_allclose(sin[0], np.sin(angle), atol=4e-7)


def test_the_largest_positions_wrap_rightly():
    positions = np.asarray([[2**30 + 12345, 2**31 - 1]], np.int32)
    radians, _ = frequencies(8, 1e4)
    cos, _ = rotations(positions, 8, 1e4)
    np.testing.assert_allclose(cos[0], np.cos(positions[0][:, None].astype(np.float64) * radians), atol=3e-5)


def test_rotates_pairs_as_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 3, 16))
    positions = rng.integers(0, 2**20, (2, 9)).astype(np.int32)
    turned = rotate(jnp.asarray(x, jnp.float32), *rotations(positions, 16, 1e6))
    np.testing.assert_allclose(turned, oracle.rotate(x, positions, 1e6), atol=3e-6)


def test_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 64)).astype(np.float32)

    def score(i, j):
        turned_q, turned_k = (
            rotate(jnp.asarray(x), *rotations(np.asarray([[at]], np.int32), 64, 1e6)) for x, at in ((q, i), (k, j))
        )
        return float(jnp.sum(turned_q * turned_k))

    assert score(1_048_575, 1_048_500) == pytest.approx(score(75, 0), abs=1e-4)


def test_bfloat16_is_rotated_in_float32():
    x = np.random.default_rng(0).standard_normal((1, 50, 1, 64))
    positions = np.arange(1_048_526, 1_048_576, dtype=np.int32)[None]
    low = jnp.asarray(x, jnp.bfloat16)
    turned = rotate(low, *rotations(positions, 64, 1e4))
    assert turned.dtype == jnp.bfloat16
    exact = oracle.rotate(np.asarray(low, np.float64), positions, 1e4)
    np.testing.assert_allclose(np.asarray(turned, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_linear_divides_positions():
    plain, _ = frequencies(64, 1e4)
    scaled, factor = frequencies(64, 1e4, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(scaled * 4, plain, rtol=1e-15)
    assert factor == 1.0


def test_llama3_is_the_published_formula():
    """Llama 3.1, as published: by wavelength, one frequency at a time."""
    published = []
    for i in range(64):
        frequency = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            published.append(frequency)
        elif wavelength > 8192 / 1.0:
            published.append(frequency / 8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            published.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    ours, factor = frequencies(128, 500000.0, LLAMA3)
    np.testing.assert_allclose(ours, published, rtol=1e-14)
    assert factor == 1.0 and len(set(np.round(ours / frequencies(128, 500000.0)[0], 6))) > 3


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_the_published_formula(truncate):
    """arXiv:2309.00071, eq. 13–14 and 17–18, with the paper's code's whole-pair ends."""
    head_dim, theta, old, scale = 128, 10000.0, 4096, 32.0

    def dimension(rotations):
        return head_dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(32.0), dimension(1.0)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    published = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        published.append(ramp * frequency / scale + (1 - ramp) * frequency)
    ours, factor = frequencies(head_dim, theta, RopeScaling("yarn", scale, old, truncate=truncate))
    np.testing.assert_allclose(ours, published, rtol=1e-14)
    assert factor == pytest.approx(0.1 * math.log(32.0) + 1.0, rel=1e-15)


def test_yarn_attention_factor_is_on_cosine_and_sine():
    positions = np.asarray([[0, 5, 70000]], np.int32)
    cos, sin = rotations(positions, 64, 1e4, YARN)
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(32.0) + 1) ** 2, rtol=1e-6)
    given, _ = rotations(positions, 64, 1e4, RopeScaling("yarn", 32.0, 4096, attention_factor=1.5))
    np.testing.assert_allclose(given[0, 0], 1.5, rtol=1e-6)


def test_yarn_with_mscales_is_their_quotient():
    scaling = RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=0.5)
    _, factor = frequencies(64, 1e4, scaling)
    assert factor == pytest.approx((0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1))
