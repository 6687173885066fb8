"""What is right passes, what is a little wrong does not; and rings without rotations."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ringjax as rj
from ringjax.benchmarks import check, programs, still, workload
from ringjax.benchmarks.programs import Way
from ringjax.benchmarks.workload import Workload
from ringjax.planning.traffic import Traffic
from tests.attention import cases

CAUSAL = Workload("causal", 96, 4, 2, 8, dtype="float32")
HERE = Way("one_device", None, "reference", 1)


def outputs(work: Workload, way: Way = HERE):
    arrays = workload.inputs(work)
    function = programs.of_pass(programs.attend(work, way, None), "both")
    return arrays, jax.jit(function)(*arrays, work.reach())


@pytest.mark.parametrize("count", [None, 8])
def test_right_results_pass(count):
    arrays, found = outputs(CAUSAL)
    (question,) = check.questions(CAUSAL, arrays, count)
    errors = check.Expected.of(question).errors(found, np.arange(96))
    assert set(errors) == {"out", "dq", "dk", "dv"} and check.passes(errors)
    assert all(bound == check.FLOAT32 for _, bound in errors.values())


@pytest.mark.parametrize("index, name", list(enumerate(("out", "dq", "dk", "dv"))))
def test_one_wrong_token_fails(index, name):
    arrays, found = outputs(CAUSAL)
    (question,) = check.questions(CAUSAL, arrays, 8)
    wrong = [x.at[0, 95, 0].multiply(1.01) if i == index else x for i, x in enumerate(found)]
    errors = check.Expected.of(question).errors(wrong, np.arange(96))
    assert not check.passes(errors)
    assert [n for n, (e, bound) in errors.items() if e > bound] == [name]


def test_a_nan_fails():
    arrays, found = outputs(CAUSAL)
    (question,) = check.questions(CAUSAL, arrays, None)
    errors = check.Expected.of(question).errors((found[0].at[0, 3, 1, 2].set(jnp.nan),), np.arange(96))
    assert errors["out"][0] == float("inf") and not check.passes(errors)


def test_keys_are_judged_only_where_all_that_see_them_are_asked():
    arrays = workload.inputs(CAUSAL)
    (causal,) = check.questions(CAUSAL, arrays, 8)
    np.testing.assert_array_equal(causal.keys, np.arange(88, 96))
    assert set(range(88, 96)) < set(causal.queries) and len(causal.queries) <= 16
    full = dataclasses.replace(CAUSAL, mask="full")
    (question,) = check.questions(full, arrays, 8)
    assert len(question.keys) == 0
    errors = check.Expected.of(question).errors(outputs(full)[1], np.arange(96))
    assert set(errors) == {"out", "dq"} and check.passes(errors)


def test_bounds_of_bfloat16_are_those_of_the_plain_formula():
    work = dataclasses.replace(CAUSAL, dtype="bfloat16", batch=2)
    arrays, found = outputs(work)
    questions = check.questions(work, arrays, None)
    assert [q.row for q in questions] == [0, 1]
    errors = check.Expected.of(questions[1]).errors(found, np.arange(96))
    # The judged function is the plain formula itself: it uses up exactly a half and a third of what is allowed.
    assert errors["out"][0] / errors["out"][1] == pytest.approx(1 / 2)
    assert errors["dk"][0] / errors["dk"][1] == pytest.approx(1 / 3)
    assert 1e-3 < errors["out"][1] < 2e-2


def test_worst_keeps_what_is_nearest_to_its_bound():
    assert check.worst({"out": (1.0, 2.0)}, {"out": (1.5, 8.0), "dq": (3.0, 1.0)}) == {
        "out": (1.0, 2.0),
        "dq": (3.0, 1.0),
    }


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_a_ring_that_stands_still_does_the_same_work_and_sends_nothing(layout):
    ring_size = 2
    way, mesh = Way("ring", layout, "auto", ring_size), cases.mesh(ring_size)
    work = dataclasses.replace(CAUSAL, length=128)
    arrays = workload.in_layout(workload.inputs(work), layout, ring_size, mesh)
    function = programs.of_pass(programs.attend(work, way, mesh), "both")
    moving = programs.compiled(function, *arrays, None)
    with still.in_place_of_ring(still.Still):
        quiet = programs.compiled(function, *arrays, None)
    again = programs.compiled(function, *arrays, None)
    assert "collective-permute" in moving.text and "collective-permute" not in quiet.text
    assert still.work_in(moving.text) == still.work_in(quiet.text) and still.work_in(quiet.text)["dot"] > 0
    for a, b, c in zip(moving.call(), again.call(), quiet.call()):
        np.testing.assert_array_equal(a, b)  # the stand-in is gone afterwards
        assert not np.allclose(a, c, rtol=1e-2)


def test_transfers_alone_are_those_that_the_planner_counts():
    ring_size, way = 4, Way("ring", "striped", "auto", 4)
    traffic = Traffic.of("striped", ring_size, 96, kv_heads=2, head_dim=8, dtype="float32")
    for kind, sent in (("forward", traffic.forward), ("both", traffic.forward + traffic.backward)):
        program = programs.transfers(CAUSAL, way, kind, cases.mesh(ring_size))
        sizes = [int(n) for n in re.findall(r"f32\[(\d+)\]\S* collective-permute\(", program.text)]
        assert 4 * sum(sizes) == sent
    near = dataclasses.replace(CAUSAL, mask="window:8", length=128)
    assert programs.transfers(near, dataclasses.replace(way, layout="contiguous"), "forward", cases.mesh(4)) is not None
    alone = dataclasses.replace(CAUSAL, mask="window:1")
    assert programs.transfers(alone, way, "forward", cases.mesh(4)) is None


@pytest.mark.parametrize("layout", ["striped", "zigzag", "contiguous"])
def test_shares_are_what_the_devices_of_a_ring_do(layout):
    """With the same K and V on every device, a share's results are those of a real ring's device."""
    ring_size, length = 2, 32
    way = Way("ring", layout, "auto", ring_size, share=True)
    work = dataclasses.replace(CAUSAL, length=ring_size * length)
    q, k, v, dout = (x[:, :length] for x in workload.inputs(work))
    attend = programs.attend(work, way, None)
    function = programs.of_pass(attend, "both")

    def on_ring(q, k, v, dout, reach):
        local = lambda *xs: programs.of_pass(  # noqa: E731
            lambda q, k, v, reach: rj.ring_attention(q, k, v, axis_name="sp", layout=layout), "both"
        )(*xs, None)
        return jax.shard_map(local, mesh=cases.mesh(ring_size), in_specs=P(None, "sp"), out_specs=P(None, "sp"))(
            *(jnp.tile(x, (1, ring_size, 1, 1)) for x in (q, k, v, dout))
        )

    ring = jax.jit(on_ring)(q, k, v, dout, None)
    summed = 0
    for rank in range(ring_size):
        with still.as_device(rank, ring_size):
            share = programs.compiled(function, q, k, v, dout, None).call()
        mine = slice(rank * length, (rank + 1) * length)
        np.testing.assert_allclose(share[0], ring[0][:, mine], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(share[1], ring[1][:, mine], rtol=1e-4, atol=1e-5)
        summed += share[2]
    # A real dK of a device is what all devices add to its own keys; over all devices the sums agree.
    np.testing.assert_allclose(summed, sum(jnp.split(ring[2], ring_size, axis=1)), rtol=1e-4, atol=1e-5)
