"""Masks, useful FLOPs and inputs; and the oracle that judges by its own formula."""

import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax.attention.kernels.reference import visible_pairs
from ringjax.benchmarks import oracle, workload
from ringjax.benchmarks.workload import Workload
from tests.attention import cases
from tests.attention import oracle as other_oracle

MASKS = ("causal", "full", "packed", "window:40")


def work(mask: str, **changes) -> Workload:
    return Workload(mask, **{**dict(length=192, heads=4, kv_heads=2, head_dim=8, batch=2, mean_document=30), **changes})


@pytest.mark.parametrize("mask", MASKS)
def test_useful_flops_are_those_of_the_pairs_that_the_library_sees(mask):
    w = work(mask)
    index = jnp.arange(w.length)
    reach = {
        "causal": rj.Reach.causal(w.batch, w.length),
        "full": rj.Reach.full(w.batch, w.length),
        "packed": w.reach(),
        "window:40": rj.Reach.causal(w.batch, w.length, window=40),
    }[mask]
    start, stop = reach.interval(index)
    lo, hi = jnp.clip(start, 0, w.length), jnp.clip(stop, 0, w.length)
    assert w.pairs == int(visible_pairs(lo, hi).sum())
    assert w.flops("forward") == 4 * w.pairs * 4 * 8
    assert w.flops("both") == 3.5 * w.flops("forward")


def test_pairs_by_hand():
    assert work("causal").pairs == 2 * 192 * 193 // 2
    assert work("full").pairs == 2 * 192**2
    assert work("window:40").pairs == 2 * (40 * 41 // 2 + (192 - 40) * 40)


def test_documents_have_the_mean_length_and_fill_the_row():
    position = workload.positions(400_000, 100, seed=0)
    assert len(position) == 400_000
    documents = int((position == 0).sum())
    assert 90 < 400_000 / documents < 110
    lengths = np.diff(np.flatnonzero(position == 0))
    assert np.std(lengths) > 80 and len(set(lengths % 8)) == 8  # wide, and multiples of nothing
    assert (workload.positions(500, 100, 1) != workload.positions(500, 100, 2)).any()


def test_a_shorter_workload_is_of_the_same_kind():
    short = work("packed").at(64)
    assert (short.mask, short.length, short.mean_document) == ("packed", 64, 8)
    assert work("window:40").at(64).window == 16
    assert work("causal", length=64).at(64) == work("causal", length=64)


def test_inputs_do_not_depend_on_the_devices():
    mesh = cases.mesh(4)
    w = work("causal")
    one = workload.inputs(w)
    from jax.sharding import NamedSharding, PartitionSpec

    four = workload.inputs(w, NamedSharding(mesh, PartitionSpec(None, "sp")))
    assert [x.shape for x in one] == [(2, 192, 4, 8), (2, 192, 2, 8), (2, 192, 2, 8), (2, 192, 4, 8)]
    for a, b in zip(one, four):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert float(jnp.abs(a.astype(jnp.float32)).mean()) > 0.5  # zeros would run faster than anything real


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_places_find_every_token(layout):
    place = workload.places(layout, 4, 64)
    moved = rj.layouts.get(layout).permute(np.arange(64)[None], 4, axis=1)[0]
    np.testing.assert_array_equal(moved[place], np.arange(64))


@pytest.mark.parametrize("mask", MASKS)
def test_oracle_agrees_with_the_tests_own(mask):
    w = work(mask, dtype="float32", length=130)
    q, k, v, dout = (np.asarray(x, np.float64) for x in workload.inputs(w))
    start, stop = w.interval
    exact = other_oracle.attention(q, k, v, start, stop, dout, np.zeros((2, 4, 130)))
    for row in range(2):
        found = oracle.attention(q[row], k[row], v[row], start[row], stop[row], dout[row])
        for name in ("out", "dq", "dk", "dv"):
            np.testing.assert_allclose(getattr(found, name), getattr(exact, name)[row], atol=1e-12)


def test_oracle_of_some_queries_and_of_one_that_sees_nothing():
    w = work("causal", dtype="float32")
    q, k, v, dout = (np.asarray(x, np.float64)[0] for x in workload.inputs(w))
    rows = np.array([3, 100, 191])
    start, stop = (x[0][rows] for x in w.interval)
    whole = oracle.attention(q, k, v, *(x[0] for x in w.interval), dout)
    some = oracle.attention(q[rows], k, v, start, stop, dout[rows])
    np.testing.assert_allclose(some.out, whole.out[rows], atol=1e-12)
    np.testing.assert_allclose(some.dq, whole.dq[rows], atol=1e-12)
    blind = oracle.attention(q[:1], k, v, np.array([5]), np.array([5]), dout[:1])
    assert not blind.out.any() and not blind.dk.any()
