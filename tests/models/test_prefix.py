"""Rows that share a prefix, which is computed and kept once, equal rows that each have it."""

import jax
import numpy as np
import pytest

from ringjax.attention import layouts
from ringjax.models import Parallel
from ringjax.models.prefix import Prefix
from ringjax.models.transformer import unstacked
from tests.models import cases
from tests.models.cases import changed
from tests.models.test_cache import close, sequence

SHARED, SUFFIX = 8, 8


@pytest.mark.parametrize("shape, layout", [(None, "striped"), ((2, 1, 1, 4), "zigzag"), ((1, 1, 4, 2), "striped")])
def test_equals_whole_rows(shape, layout):
    """Through the prefill and after it."""
    parallel = Parallel(None if shape is None else cases.mesh(*shape), layout)
    config = changed(softcap=4.0)
    tokens, modality, position = sequence(config)
    tokens[:, :SHARED], modality[:, :SHARED] = tokens[:1, :SHARED], modality[:1, :SHARED]
    full = np.asarray(cases.model(config).hidden(tokens, modality, position))
    model, order = cases.model(config, parallel), layouts.get(layout)
    if shape is None:
        model = unstacked(model)
    cut = lambda x, a, b: order.permute(x[:, a:b], parallel.ring_size, 1)  # noqa: E731
    inputs = tokens, modality, position
    end = SHARED + SUFFIX

    @jax.jit
    def run(first, own, last):
        _, shared = model.prefill(*first, cache_length=SHARED, parallel=parallel)
        prefix = Prefix.of(shared, config)
        room = SUFFIX if layout == "zigzag" else 2 * SUFFIX
        states, cache = model.prefill(*own, cache_length=room, parallel=parallel, prefix=prefix)
        if layout == "zigzag":  # no room after a prefill: the last of it are written again
            cache = cache._replace(lengths=cache.lengths - 3)
        return states, model.decode(*last, cache, parallel=parallel, prefix=prefix)[0]

    from_ = end - 3 if layout == "zigzag" else end
    last = [x[:, from_ : from_ + 3] for x in inputs]
    states, more = run([cut(x, 0, SHARED) for x in inputs], [cut(x, SHARED, end) for x in inputs], last)
    close(order.restore(np.asarray(states), parallel.ring_size, 1), full[:, SHARED:end])
    close(more, full[:, from_ : from_ + 3])


def test_what_it_refuses():
    model, inputs = cases.model(), [x[:, :SHARED] for x in sequence(cases.SMALL)]
    _, cache = model.prefill(*inputs, cache_length=SHARED, cache_type="int8")
    with pytest.raises(NotImplementedError, match="int8 cache"):
        Prefix.of(cache, cases.SMALL)
    with pytest.raises(NotImplementedError, match="a shared prefix and window 4"):
        Prefix.of(cache, changed(window=4))
