import jax
import numpy as np
import pytest
from flax import nnx

from ringjax.attention import Reach, layouts
from ringjax.models import Parallel
from ringjax.models.transformer import unstacked, with_config
from tests.models import cases
from tests.models.cases import changed

ROWS, LENGTH, PROMPT, CAPACITY = 2, 24, 16, 24


def sequence(config):
    batch = cases.batch(config, rows=ROWS, length=LENGTH)
    position = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    return batch["tokens"], batch["modality"], position


@pytest.mark.parametrize(
    "shape, layout, window",
    [
        (None, "striped", None),
        (None, "striped", 6),
        ((2, 1, 2, 2), "striped", 6),
        ((1, 1, 1, 4), "striped", None),
        pytest.param((2, 1, 1, 1), "zigzag", None, marks=pytest.mark.slow),
    ],
)
def test_decoding_equals_the_full_forward(shape, layout, window):
    config = changed(window=window)
    parallel = Parallel(None if shape is None else cases.mesh(*shape), layout)
    model = cases.model(config, parallel)
    inputs = sequence(config)
    full = np.asarray(cases.model(config).hidden(*inputs))

    order = layouts.get(layout)
    prompt = [order.permute(x[:, :PROMPT], parallel.ring_size, 1) for x in inputs]
    reach = Reach.causal(ROWS, PROMPT).permute(layout, parallel.ring_size)
    prefill = jax.jit(lambda *x: model.prefill(*x, reach, cache_length=CAPACITY, parallel=parallel))
    states, cache = prefill(*prompt)
    close(order.restore(np.asarray(states), parallel.ring_size, 1), full[:, :PROMPT])

    decode = jax.jit(lambda cache, *x: model.decode(*x, cache, parallel=parallel))
    for t in range(PROMPT, PROMPT + 4):
        states, cache = decode(cache, *(x[:, t : t + 1] for x in inputs))
        close(states, full[:, t : t + 1])
    states, cache = decode(cache, *(x[:, PROMPT + 4 :] for x in inputs))  # several at once, to the last slot
    close(states, full[:, PROMPT + 4 :])
    assert cache.lengths.tolist() == [CAPACITY] * ROWS and cache.capacity == CAPACITY


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_different_lengths():
    """New tokens of a shorter row overwrite its padding."""
    model, inputs = cases.model(), sequence(cases.SMALL)
    lengths = np.asarray([PROMPT, PROMPT - 5], np.int32)
    padded = [np.where(np.arange(PROMPT) < lengths[:, None], x[:, :PROMPT], 0).astype(x.dtype) for x in inputs]
    _, cache = model.prefill(*padded, cache_length=LENGTH, lengths=lengths)
    full = np.asarray(model.hidden(*inputs))
    for step in range(3):
        at = lengths[:, None] + step
        states, cache = model.decode(*(np.take_along_axis(x, at, 1) for x in inputs), cache)
        close(states, np.take_along_axis(full, at[..., None], 1))


def test_the_cache_is_cut_over_the_mesh():
    parallel = Parallel(cases.mesh(1, 1, 2, 4))
    model = cases.model(cases.SMALL, parallel)
    prompt = [x[:, :PROMPT] for x in sequence(cases.SMALL)]
    _, cache = jax.jit(lambda *x: model.prefill(*x, cache_length=CAPACITY, parallel=parallel))(*prompt)
    whole = cases.SMALL.layers, ROWS, CAPACITY, cases.SMALL.key_heads, cases.SMALL.head_size
    assert cache.k.shape == whole
    assert cache.k.sharding.shard_shape(whole) == (whole[0], ROWS, CAPACITY // 4, whole[3] // 2, whole[4])


def test_refuses_a_cache_that_cannot_hold_the_prompt():
    model, inputs = cases.model(), sequence(cases.SMALL)
    with pytest.raises(ValueError, match="cache_length 8 is shorter than the 24 tokens"):
        model.prefill(*inputs, cache_length=8)


def test_refuses_layouts_whose_tokens_would_move():
    parallel = Parallel(cases.mesh(1, 1, 1, 4), "zigzag")
    model, inputs = cases.model(cases.SMALL, parallel), sequence(cases.SMALL)
    with pytest.raises(NotImplementedError, match="layout 'zigzag' over sp = 4.*use layout 'striped'"):
        model.prefill(*inputs, cache_length=32, parallel=parallel)
    with pytest.raises(ValueError, match="seq_len 30 cannot be cut into 4 shards"):
        striped = Parallel(parallel.mesh)
        model.prefill(*inputs, cache_length=30, parallel=striped)


def test_layers_apart_are_the_same_model():
    """What GPUs decode with."""
    model, inputs = cases.model(), sequence(cases.SMALL)
    apart = unstacked(model)
    assert [block.attention.wq.kernel[...].ndim for block in apart.h] == [2] * cases.SMALL.layers
    close(apart.hidden(*inputs), model.hidden(*inputs))
    found, expected = (m.prefill(*(x[:, :PROMPT] for x in inputs), cache_length=CAPACITY) for m in (apart, model))
    jax.tree.map(close, found, expected)
    last = [x[:, PROMPT : PROMPT + 2] for x in inputs]
    jax.tree.map(close, apart.decode(*last, found[1]), model.decode(*last, expected[1]))


def test_layers_apart_take_another_config():
    model, inputs = cases.model(), sequence(cases.SMALL)
    others = [with_config(m, rope_theta=5e7, window=5, sinks=2) for m in (unstacked(model), model)]
    assert isinstance(others[0].h, nnx.List) and others[0].h[1].config.sinks == 2
    close(*(m.hidden(*inputs) for m in others))
    again = with_config(unstacked(model), rope_theta=5e7, window=5, sinks=2)
    assert nnx.graphdef(again) == nnx.graphdef(others[0])  # so that it compiles once


def test_more_devices_than_key_heads():
    """Each reads the head that its queries belong to."""
    parallel = Parallel(cases.mesh(1, 1, 4, 2))
    model, inputs = cases.model(cases.SMALL, parallel), sequence(cases.SMALL)
    full = np.asarray(cases.model().hidden(*inputs))
    order = layouts.get("striped")
    prompt = [order.permute(x[:, :PROMPT], 2, 1) for x in inputs]
    reach = Reach.causal(ROWS, PROMPT).permute("striped", 2)
    _, cache = jax.jit(lambda *x: model.prefill(*x, reach, cache_length=CAPACITY, parallel=parallel))(*prompt)
    states, _ = jax.jit(lambda *x: model.decode(*x, cache, parallel=parallel))(*(x[:, PROMPT:] for x in inputs))
    close(states, full[:, PROMPT:])
