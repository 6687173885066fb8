"""Work counted from slots equals work counted on the dense mask, for every layout and kind of mask."""

import numpy as np
import pytest

import ringjax as rj
from ringjax.planning import work
from tests.attention import cases

LENGTH, BATCH = 48, 2
MASKS = cases.masks(BATCH, LENGTH)


def brute_force(layout: str, ring_size: int, behind, ahead) -> np.ndarray:
    """The same counts from the `[B, T, T]` mask and the global index of each slot."""
    g = np.arange(LENGTH)
    mask = (g >= (g - behind)[..., None]) & (g <= (g + ahead)[..., None])
    shards = rj.layouts.get(layout).permute(g[None], ring_size, 1).reshape(ring_size, -1)
    hop = lambda d, h: mask[:, shards[d]][:, :, shards[(d - h) % ring_size]].sum()  # noqa: E731
    return np.array([[hop(d, h) for h in range(ring_size)] for d in range(ring_size)])


@pytest.mark.parametrize("ring_size", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_pairs_equal_those_of_the_dense_mask(layout, ring_size):
    for name, (behind, ahead) in MASKS.items():
        found = work.pairs(layout, ring_size, LENGTH, rj.Reach(behind, ahead))
        np.testing.assert_array_equal(found, brute_force(layout, ring_size, behind, ahead), err_msg=name)


def test_without_a_reach_it_is_causal():
    found = work.pairs("zigzag", 4, LENGTH)
    assert found.sum() == LENGTH * (LENGTH + 1) // 2
    np.testing.assert_array_equal(found, work.pairs("zigzag", 4, LENGTH, rj.Reach.causal(1, LENGTH)))


def test_pairs_of_a_million_tokens_do_not_overflow():
    seq_len = 2**20
    assert work.pairs("striped", 8, seq_len).sum() == seq_len * (seq_len + 1) // 2


def test_causal_balance():
    """Contiguous: nothing above the diagonal, full blocks below. Striped, zigzag: half a block everywhere."""
    ring_size, block = 8, (LENGTH // 8) ** 2
    contiguous = work.pairs("contiguous", ring_size, LENGTH)
    device, hop = np.indices(contiguous.shape)
    assert (contiguous[hop > device] == 0).all() and (contiguous[(hop > 0) & (hop <= device)] == block).all()
    for layout in ("striped", "zigzag"):
        found = work.pairs(layout, ring_size, LENGTH)
        assert (abs(found - block / 2) <= LENGTH // 8 / 2).all()
        assert work.busy(found) > 0.85 > 0.58 > work.busy(contiguous)


@pytest.mark.parametrize("ring_size, seq_len", [(1, 8), (2, 32), (4, 48), (8, 1024)])
def test_speed_up_is_the_ratio_of_what_the_rings_wait_for(ring_size, seq_len):
    waited = {name: work.slowest(work.pairs(name, ring_size, seq_len)) for name in ("contiguous", "striped")}
    assert work.causal_speed_up(ring_size, seq_len) == pytest.approx(waited["contiguous"] / waited["striped"])


def test_speed_up_tends_to_two():
    assert work.causal_speed_up(8, 2**20) == pytest.approx(2 - 1 / 8, rel=1e-4)
    assert 1.99 < work.causal_speed_up(512, 2**20) < 2


@pytest.mark.parametrize("window", [1, 5, 6, 7, 12, 13, 40])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_hops_that_are_not_made_have_no_work(layout, window):
    made = work.hops(layout, 8, LENGTH, window - 1)
    found = work.pairs(layout, 8, LENGTH, rj.Reach.causal(1, LENGTH, window))
    skipped = [h for h in range(8) if h not in made]
    assert (found[:, skipped] == 0).all()
    assert work.hops(layout, 8, LENGTH) == tuple(range(8))


def test_contiguous_window_makes_only_the_hops_it_needs():
    assert work.hops("contiguous", 8, LENGTH, LENGTH // 8 - 1) == (0, 1)
    assert work.hops("contiguous", 8, LENGTH, 0) == (0,)


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="cannot be cut into 8 shards"):
        work.pairs("striped", 8, 50)
    with pytest.raises(ValueError, match=r"reach.behind has shape \(1, 40\)"):
        work.pairs("striped", 8, LENGTH, rj.Reach.causal(1, 40))
    with pytest.raises(ValueError, match="pad to 64 or use 'striped'"):
        work.hops("zigzag", 8, 56)


def test_busy_of_an_idle_ring():
    nothing = rj.Reach.causal(1, 16).masked(np.zeros((1, 16), bool))
    assert work.busy(work.pairs("striped", 4, 16, nothing)) == 1.0
