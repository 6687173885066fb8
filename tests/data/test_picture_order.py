"""The order in which pictures are seen."""

import numpy as np
import pytest

from ringjax.data.picture_order import PictureOrder


def test_an_epoch_is_every_row_once():
    order = PictureOrder([5, 3], None, seed=1)
    first, second = order.rows(0, 8), order.rows(8, 8)
    everything = sorted([0, i] for i in range(5)) + sorted([1, i] for i in range(3))
    assert sorted(first.tolist()) == everything == sorted(second.tolist())
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("weights", [None, [3, 1], [0.01, 1]])
def test_any_place_can_be_gone_to(weights):
    order, again = PictureOrder([7, 4], weights, seed=2), PictureOrder([7, 4], weights, seed=2)
    whole = order.rows(0, 60)
    for start in (0, 10, 11, 32, 53):
        np.testing.assert_array_equal(again.rows(start, 7), whole[start : start + 7])
    assert PictureOrder([7, 4], weights, seed=3).rows(0, 60).tolist() != whole.tolist()


def test_weights_say_how_often_a_source_is_seen():
    order = PictureOrder([90, 10], [1, 1], seed=0)
    rows = order.rows(0, 300)
    assert [np.sum(rows[:, 0] == s) for s in (0, 1)] == [150, 150]
    seen = np.bincount(rows[rows[:, 0] == 1, 1])
    assert seen.tolist() == [15] * 10  # the small source comes round evenly
    assert np.bincount(rows[rows[:, 0] == 0, 1], minlength=90).max() <= 2
