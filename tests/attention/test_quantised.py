"""An int8 cache: what rounding costs, and that nothing else is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.attention import quantised, validate
from ringjax.attention.decode import cached_attention
from ringjax.attention.kernels import reference
from tests.attention import cases, oracle
from tests.attention.test_decode import LENGTHS, case


def test_rounding_is_half_a_step():
    x = np.random.default_rng(0).standard_normal((3, 5, 2, 16)).astype(np.float32)
    x[0, 0] = 0
    numbers, scale = quantised.quantise(x)
    assert numbers.dtype == jnp.int8 and scale.shape == (3, 5, 2) and scale.dtype == jnp.float32
    back = quantised.dequantise(numbers, scale, jnp.float32)
    assert np.all(np.abs(back - x) <= np.asarray(scale)[..., None] * 0.5001) and np.all(np.asarray(back[0, 0]) == 0)
    assert np.abs(numbers).max() == 127


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_attention_to_what_was_kept(softcap):
    q, k, v, *_ = cases.inputs(2, 3, 4, 2, 8, 8, keys=40)
    lo, hi = jnp.asarray([[0, 3, 9], [5, 5, 40]]), jnp.asarray([[40, 7, 9], [6, 30, 40]])
    kept = [quantised.quantise(x) for x in (k, v)]
    back = [quantised.dequantise(*x, jnp.float32) for x in kept]
    score = validate.score(None, softcap, 8)
    found = quantised.forward(q, kept[0][0], kept[1][0], kept[0][1], kept[1][1], lo, hi, score)
    expected = reference.forward(q, *back, lo, hi, score)
    assert oracle.error(found.out, expected.out) <= 1e-6 and oracle.error(found.lse, expected.lse) <= 1e-6
    exact = reference.forward(q, k, v, lo, hi, score)
    assert 1e-4 < oracle.error(found.out, exact.out) < 1e-2


@pytest.mark.parametrize("new", [1, 12])
def test_one_layer_of_several(new):
    """Few queries and many; garbage past the length is not seen."""
    q, k, v = case(new)
    lengths = np.maximum(LENGTHS, new)
    caches = [quantised.quantise(jnp.stack([x * 9, x])) for x in (k, v)]
    numbers, scales = zip(*caches)
    run = jax.jit(lambda q, layer: cached_attention(q, *numbers, layer, lengths=lengths, scales=scales))
    expected = cached_attention(q, k[None], v[None], jnp.int32(0), lengths=lengths)
    assert oracle.error(run(q, jnp.int32(1)).out, expected.out) < 1e-2
