"""A window with sinks equals a model that keeps `sinks + window` tokens and counts positions among those."""

import dataclasses

import jax
import numpy as np
import pytest

from ringjax.attention import Reach, layouts
from ringjax.models import Parallel
from ringjax.models.rope import rotate, rotations
from ringjax.models.sinks import sink_positions, with_sinks
from tests.models import cases
from tests.models.cases import changed
from tests.models.test_cache import LENGTH, ROWS, close, sequence

WINDOW, SINKS = 5, 2
CONFIG = changed(window=WINDOW, sinks=SINKS)


def streaming(q, k, v):
    """StreamingLLM as published: keys are kept as they are and turned by their place among those that are kept."""
    out = np.zeros(q.shape)
    theta, groups = CONFIG.rope_theta, q.shape[2] // k.shape[2]
    for t in range(q.shape[1]):
        kept = [i for i in range(t + 1) if i < SINKS or i > t - WINDOW]
        turn = rotations(np.arange(len(kept))[None], q.shape[-1], theta)
        keys = np.asarray(rotate(k[:, kept], *turn), np.float64).repeat(groups, 2)
        query = np.asarray(rotate(q[:, t : t + 1], *(x[:, -1:] for x in turn)), np.float64)
        scores = np.einsum("bqnh,bsnh->bns", query, keys) / np.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, t] = np.einsum("bns,bsnh->bnh", p / p.sum(-1, keepdims=True), v[:, kept].repeat(groups, 2))
    return out


@pytest.mark.parametrize("shape, layout", [
    (None, "striped"), ((2, 1, 1, 4), "zigzag"), ((1, 1, 4, 2), "striped"), ((1, 1, 1, 8), "contiguous"),
])  # fmt: skip
def test_equals_the_published_cache(shape, layout):
    """Also with more devices along tp than there are key/value heads."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 16, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    parallel = Parallel(None if shape is None else cases.mesh(*shape), layout)
    order = layouts.get(layout)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))

    def attend(q, k, v, positions):
        turn = lambda x, at: rotate(x, *rotations(at, 8, CONFIG.rope_theta))  # noqa: E731
        k, reach = turn(k, positions), Reach(positions, 0 * positions, max_ahead=0)
        seen = parallel.attend(turn(q, positions), k, v, reach, window=WINDOW, return_lse=True)
        far = turn(q, sink_positions(positions, CONFIG))
        return with_sinks(*seen, far, k, v, positions, config=CONFIG, parallel=parallel)

    found = jax.jit(attend)(*(order.permute(x, parallel.ring_size, 1) for x in (q, k, v, positions)))
    close(order.restore(np.asarray(found), parallel.ring_size, 1), streaming(q, k, v))


@pytest.mark.parametrize("shape, layout", [(None, "striped"), ((1, 1, 4, 2), "zigzag"), ((1, 1, 1, 4), "striped")])
def test_decoding_equals_the_full_forward(shape, layout):
    parallel = Parallel(None if shape is None else cases.mesh(*shape), layout)
    inputs, order = sequence(CONFIG), layouts.get(layout)
    full = np.asarray(cases.model(CONFIG).hidden(*inputs))
    prompt = LENGTH if layout == "zigzag" else 16
    model = cases.model(CONFIG, parallel)
    ordered = [order.permute(x[:, :prompt], parallel.ring_size, 1) for x in inputs]
    reach = Reach.causal(ROWS, prompt).permute(layout, parallel.ring_size)
    states, cache = jax.jit(lambda *x: model.prefill(*x, reach, cache_length=LENGTH, parallel=parallel))(*ordered)
    close(order.restore(np.asarray(states), parallel.ring_size, 1), full[:, :prompt])
    if layout == "zigzag":  # what follows the first ten is written again
        cache, prompt = cache._replace(lengths=0 * cache.lengths + 10), 10
    decode = jax.jit(lambda cache, *x: model.decode(*x, cache, parallel=parallel))
    for first, stop in ((prompt, prompt + 1), (prompt + 1, prompt + 5)):
        states, cache = decode(cache, *(x[:, first:stop] for x in inputs))
        close(states, full[:, first:stop])


def test_a_window_that_holds_everything_makes_sinks_idle():
    inputs = sequence(cases.SMALL)
    wide = cases.model(dataclasses.replace(CONFIG, window=LENGTH))
    close(wide.hidden(*inputs), cases.model().hidden(*inputs))


def test_sinks_need_a_window():
    with pytest.raises(ValueError, match="sinks 2 without a window"):
        changed(sinks=2)
    with pytest.raises(ValueError, match="sinks -1 must be"):
        changed(window=4, sinks=-1)
