import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.models import Parallel
from ringjax.models.feed_forward import blockwise_feed_forward
from tests.models import cases
from tests.models.hlo import collectives

WIDTH, INNER = 16, 24


def inputs(rows=2, length=24, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (rows, length, WIDTH), (WIDTH, INNER), (INNER, WIDTH), (WIDTH, INNER), (rows, length, WIDTH)
    x, w1, w2, w3, dy = (rng.standard_normal(shape) for shape in shapes)
    return x.astype(dtype), *(w.astype(np.float32) for w in (w1, w2, w3)), dy.astype(dtype)


def plain(x, w1, w2, w3):
    return (jax.nn.silu(x @ w1) * (x @ w3)) @ w2


@pytest.mark.parametrize("chunk", [1, 5, 12, 1000])  # 5 does not divide the tokens of a device
@pytest.mark.parametrize("shape", [None, (1, 2, 2, 2)])
def test_blockwise_equals_plain(chunk, shape):
    parallel = Parallel(None if shape is None else cases.mesh(*shape))
    *primals, dy = inputs()
    y, pull = jax.vjp(lambda *p: blockwise_feed_forward(*p, chunk, parallel), *primals)
    expected, expected_pull = jax.vjp(plain, *primals)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(pull(dy), expected_pull(dy)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def program(length: int, chunk: int) -> jax.stages.Compiled:
    """Output and all gradients on a ring of 4 with tp 2."""
    parallel = Parallel(cases.mesh(1, 1, 2, 4))
    stream = parallel.sharding("batch", "sequence", None)
    up, down = parallel.sharding("embed", "ffn"), parallel.sharding("ffn", "embed")

    def step(x, w1, w2, w3, dy):
        y, pull = jax.vjp(lambda *p: blockwise_feed_forward(*p, chunk, parallel), x, w1, w2, w3)
        return y, pull(dy)

    shardings = stream, up, down, up, stream
    return jax.jit(step, in_shardings=shardings).lower(*inputs(1, length)).compile()


def test_keeps_the_sequence_where_it_is():
    """Only weights are gathered; the stream (2048 / 4 · 16 elements a device) is only summed over tp."""
    found = collectives(program(2048, 64).as_text())
    assert max(found["all-gather"]) <= WIDTH * INNER // 2  # a device's part of one weight
    assert max(found["all-reduce"]) <= 2048 // 4 * WIDTH
    assert not {"all-to-all", "collective-permute"} & set(found)


def test_one_sum_over_devices_for_all_chunks():
    few, many = (collectives(program(512, chunk).as_text()) for chunk in (128, 4))
    assert {kind: len(sizes) for kind, sizes in few.items()} == {kind: len(sizes) for kind, sizes in many.items()}


def test_holds_the_inner_activations_of_one_chunk_only():
    small, large = (program(8192, chunk).memory_analysis().temp_size_in_bytes for chunk in (16, 8192))
    inner = 8192 // 4 * (INNER // 2) * 4
    assert large - small > inner


def test_gradients_of_weights_are_summed_in_float32():
    x = jnp.ones((1, 4104, 2), jnp.bfloat16)
    w1, w2, w3 = jnp.zeros((2, 2)), jnp.ones((2, 2)), jnp.ones((2, 2))  # silu'(0) = 1/2, w3 x = 2, dy w2 = 2
    _, pull = jax.vjp(lambda w1: blockwise_feed_forward(x, w1, w2, w3, 8, Parallel()), w1)
    (dw1,) = pull(jnp.ones_like(x))
    assert dw1.dtype == jnp.float32 and (np.asarray(dw1) == 4104 * 2).all()
