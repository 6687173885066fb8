"""Vectors in the places of tokens, on any mesh and in any layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.attention import Reach, layouts
from ringjax.models import Parallel
from ringjax.models.features import Features, feature_index, splice
from tests.models import cases
from tests.models.hlo import collectives

ROWS, LENGTH, COUNT, WIDTH = 2, 32, 11, 6  # 11 features: no ring divides them


def inputs():
    rng = np.random.default_rng(0)
    index = np.where(rng.random((ROWS, LENGTH)) < 0.5, rng.integers(0, COUNT, (ROWS, LENGTH)), -1).astype(np.int32)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(ROWS, LENGTH, WIDTH), draw(ROWS, COUNT, WIDTH), index, draw(ROWS, LENGTH, WIDTH)


def test_index_counts_the_image_tokens_of_a_row():
    tokens = np.asarray([[7, 9, 9, 1, 9, 2], [9, 1, 1, 9, 9, 9]])
    assert feature_index(tokens, 9).tolist() == [[-1, 0, 1, -1, 2, -1], [0, -1, -1, 1, 2, 3]]


@pytest.mark.parametrize(
    "shape, layout",
    [(None, "striped"), ((1, 1, 1, 8), "contiguous"), ((1, 1, 1, 8), "striped"), ((2, 1, 2, 2), "zigzag")],
)
def test_features_and_gradients_find_their_places(shape, layout):
    parallel = Parallel(None if shape is None else cases.mesh(*shape), layout)
    embedded, values, index, weights = inputs()
    order = layouts.get(layout)
    placed = lambda x: order.permute(x, parallel.ring_size, 1)  # noqa: E731

    @jax.jit
    def run(embedded, values):
        found = splice(embedded, Features(values, placed(index)), parallel)
        return jnp.sum(found * placed(weights)), found

    (_, found), (dembedded, dvalues) = jax.value_and_grad(run, (0, 1), has_aux=True)(placed(embedded), values)
    row = np.arange(ROWS)[:, None]
    here = (index >= 0)[..., None]
    np.testing.assert_array_equal(
        order.restore(np.asarray(found), parallel.ring_size, 1), np.where(here, values[row, index], embedded)
    )
    expected = np.zeros_like(values)
    np.add.at(expected, (np.broadcast_to(row, index.shape), index), np.where(here, weights, 0))
    np.testing.assert_allclose(dvalues, expected, atol=1e-6)
    restored = order.restore(np.asarray(dembedded), parallel.ring_size, 1)
    np.testing.assert_array_equal(restored, np.where(here, 0, weights))


def test_no_device_holds_all_features():
    """They go around the ring in shards; nothing is gathered."""
    parallel = Parallel(cases.mesh(1, 1, 1, 8), "striped")
    embedded, values, index, _ = inputs()
    program = jax.jit(lambda *x: splice(x[0], Features(*x[1:]), parallel))
    specs = (("batch", "sequence", None), (None, None, None), ("batch", "sequence"))
    placed = [jax.device_put(x, parallel.sharding(*spec)) for x, spec in zip((embedded, values, index), specs)]
    found = collectives(program.lower(*placed).compile().as_text())
    shard = ROWS * 2 * WIDTH  # 11 features in 8 parts of 2
    assert set(found) == {"collective-permute"} and max(found["collective-permute"]) <= shard


def test_a_feature_beyond_the_last_is_an_error_that_shows():
    embedded, values, index, _ = inputs()
    index[0, 3], index[1, 2] = COUNT, -1
    found = np.asarray(splice(embedded, Features(values, index), Parallel()))
    assert np.isnan(found[0, 3]).all() and np.isnan(found).sum() == WIDTH


@pytest.mark.parametrize("name", ["index", "type", "values"])
def test_what_does_not_fit_is_refused(name):
    embedded, values, index, _ = inputs()
    index, values, message = {
        "index": (index[:, :-1], values, r"features.index is int32\[2, 31\]; it must be integer \[2, 32\]"),
        "type": (index.astype(np.float32), values, r"features.index is float32\[2, 32\]"),
        "values": (index, values[..., :5], r"features.values is \[2, 11, 5\]; it must be \[B, F, D\] = \[2, F, 6\]"),
    }[name]
    with pytest.raises(ValueError, match=message):
        splice(embedded, Features(values, index), Parallel())


def test_the_transformer_takes_them_for_tokens():
    """The vectors of the table itself, as features, change nothing; what stands in their places does not matter."""
    model, batch = cases.model(), cases.batch(rows=2)
    table = np.asarray(model.wte.embedding[...])
    text = ~batch["modality"]
    index = np.where(text & (np.arange(32) % 3 == 0), batch["tokens"], -1)
    blanked = {**batch, "tokens": np.where(index >= 0, 10**6, batch["tokens"]).astype(np.int32)}
    features = Features(np.broadcast_to(table, (2, *table.shape)), index)

    @jax.jit
    def both(features, blanked, batch):
        reach = Reach(batch["behind"], batch["ahead"])
        inputs = blanked["tokens"], batch["modality"], batch["positions"]
        return model.hidden(*inputs, reach, features=features), cases.hidden(model, batch)

    found, expected = both(features, blanked, batch)
    np.testing.assert_allclose(found, expected, atol=1e-6)
