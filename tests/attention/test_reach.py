"""Masks as intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj


def visible(reach: rj.Reach) -> np.ndarray:
    """The mask `[B, T, T]` that a reach describes."""
    length = reach.behind.shape[1]
    start, stop = reach.interval(jnp.arange(length))
    key = np.arange(length)
    return (key >= np.asarray(start)[..., None]) & (key < np.asarray(stop)[..., None])


def test_each_mask_of_the_table():
    g = np.arange(6)
    distance = g[:, None] - g
    assert np.array_equal(visible(rj.Reach.causal(1, 6))[0], distance >= 0)
    assert np.array_equal(visible(rj.Reach.causal(1, 6, window=2))[0], (distance >= 0) & (distance < 2))
    assert visible(rj.Reach.full(1, 6)).all()
    document = np.array([0, 0, 0, 0, 1, 1])
    packed = rj.Reach.packed(np.array([[0, 1, 2, 3, 0, 1]]))
    same = document[:, None] == document
    assert np.array_equal(visible(packed)[0], same & (distance >= 0))
    assert np.array_equal(visible(packed.within(3))[0], same & (distance >= 0) & (distance < 3))
    image = np.array([0, 1, 1, 1, 0, 0])
    spans = packed.looking_ahead(np.array([[0, 2, 1, 0, 0, 0]]))
    assert np.array_equal(visible(spans)[0], same & ((distance >= 0) | (image[:, None] * image == 1)))
    assert not visible(packed.masked(np.zeros((1, 6), bool))).any()


def test_permute_moves_queries_with_their_reach():
    reach = rj.Reach.causal(2, 8, window=4)
    moved = reach.permute("striped", 4)
    assert np.array_equal(moved.behind[0], np.minimum([0, 4, 1, 5, 2, 6, 3, 7], 3))
    assert (moved.max_behind, moved.max_ahead) == (3, 0)


def test_static_bounds_are_part_of_the_mask():
    """A bound that the data exceeds cuts it: the skipped hops and the mask never disagree."""
    reach = rj.Reach(jnp.full((1, 8), 7, jnp.int32), jnp.zeros((1, 8), jnp.int32), max_behind=2)
    assert visible(reach).sum(-1).max() == 3


def test_is_a_pytree_with_static_bounds():
    reach = rj.Reach.causal(1, 4, window=3)
    leaves, tree = jax.tree.flatten(reach)
    assert len(leaves) == 2 and jax.tree.unflatten(tree, leaves).max_behind == 2
    assert jax.jit(lambda r: r.within(2))(reach).max_behind == 1


@pytest.mark.parametrize("reach, message", [
    (rj.Reach(np.zeros((1, 4), np.int64), np.zeros((1, 4), np.int32)), "reach.behind has type int64"),
    (rj.Reach(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.int32)), "reach.behind has type float32"),
    (rj.Reach([[0] * 4], np.zeros((1, 4), np.int32)), "reach.behind has type list"),
    (rj.Reach(np.zeros((1, 4), np.int32), np.zeros((4,), np.int32)), r"reach.ahead has shape \(4,\).*\(1, 4\)"),
])  # fmt: skip
def test_wrong_shape_or_type(reach, message):
    q = jnp.zeros((1, 4, 1, 2))
    with pytest.raises(ValueError, match=message):
        rj.attention(q, q, q, reach=reach)


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_window_must_count_tokens(window):
    with pytest.raises(ValueError, match="at least 1"):
        rj.Reach.causal(1, 4, window=window)
