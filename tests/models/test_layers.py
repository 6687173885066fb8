import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringjax.models import Parallel
from ringjax.models.layers import RMSNorm, linear, look_up
from tests.models import cases
from tests.models.cases import SMALL


@pytest.mark.parametrize("axes", [("embed", "ffn"), ("ffn", "embed")])
@pytest.mark.parametrize("shape", [None, (1, 2, 2, 2)])
def test_linear_and_its_gradient(axes, shape):
    parallel = Parallel(None if shape is None else cases.mesh(*shape))
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.standard_normal(s).astype(np.float32) for s in ((2, 8, 16), (16, 12), (2, 8, 12)))
    y, pull = jax.vjp(lambda x, w: linear(x, w, axes, parallel), x, kernel)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-5)
    dx, dkernel = pull(dy)
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dkernel, np.einsum("bti,bto->io", x, dy), rtol=1e-5, atol=1e-5)


def test_a_kernels_gradient_is_summed_in_float32():
    """In bfloat16, adding 1 to 256 changes nothing: a sum of 4096 ones over 8 devices would stop long before."""
    parallel = Parallel(cases.mesh(1, 1, 1, 8))
    x, kernel = jnp.ones((1, 4104, 16), jnp.bfloat16), jnp.ones((16, 4), jnp.float32)
    _, pull = jax.vjp(lambda w: linear(x, w, ("embed", "ffn"), parallel), kernel)
    (dkernel,) = pull(jnp.ones((1, 4104, 4), jnp.bfloat16))
    assert dkernel.dtype == jnp.float32 and (np.asarray(dkernel) == 4104).all()


def test_norm_computes_in_float32():
    norm = RMSNorm(64, SMALL)
    norm.kernel = nnx.Param(jnp.linspace(0.5, 1.5, 64))
    x = np.random.default_rng(0).standard_normal((2, 3, 64)) * 300
    low = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(low, np.float64)
    exact = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-6) * np.linspace(0.5, 1.5, 64)
    found = norm(low)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8)
    np.testing.assert_allclose(norm(low.astype(jnp.float32)), exact, rtol=1e-6)


def test_norm_of_zeros_has_finite_gradients():
    gradient = jax.grad(lambda x: RMSNorm(8, SMALL)(x).sum())(jnp.zeros((1, 1, 8)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [None, (1, 2, 2, 2)])
def test_look_up_and_its_gradient(shape):
    parallel = Parallel(None if shape is None else cases.mesh(*shape))
    rng = np.random.default_rng(0)
    table, dout = rng.standard_normal((20, 8)).astype(np.float32), rng.standard_normal((2, 8, 8)).astype(np.float32)
    tokens, here = rng.integers(0, 20, (2, 8)).astype(np.int32), rng.random((2, 8)) < 0.6
    tokens[~here] += 1000  # belongs to another table
    found, pull = jax.vjp(lambda t: look_up(t, tokens, here, jnp.dtype("float32"), parallel), table)
    expected = np.where(here[..., None], table[tokens % 1000], 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    dtable = np.zeros_like(table)
    np.add.at(dtable, tokens[here], dout[here])
    np.testing.assert_allclose(pull(dout)[0], dtable, rtol=1e-5, atol=1e-6)


def test_look_up_sums_in_float32():
    tokens = jnp.zeros((1, 3000), jnp.int32)
    _, pull = jax.vjp(
        lambda t: look_up(t, tokens, tokens == 0, jnp.dtype("bfloat16"), Parallel()), jnp.zeros((4, 2), jnp.float32)
    )
    assert float(pull(jnp.ones((1, 3000, 2), jnp.bfloat16))[0][0, 0]) == 3000
