"""A ring gives the float64 result for every layout, ring size, kind of heads, mask and type.

The reach is data, so one compiled function serves all masks of a case.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringjax as rj
from tests.attention import cases, oracle

BATCH, LENGTH, HEAD_DIM, V_DIM = 2, 48, 16, 8
MASKS = cases.masks(BATCH, LENGTH)


@functools.cache
def compiled(attend):
    return jax.jit(
        lambda q, k, v, dout, dlse, behind, ahead: cases.results(
            lambda q, k, v: attend(q, k, v, behind, ahead), q, k, v, dout, dlse
        )
    )


@functools.cache
def ring(layout: str, ring_size: int, **options):
    return compiled(cases.sharded(layout, ring_size, **options))


@functools.cache
def plain():
    """The plain formula in the inputs' type on one device: what rounding alone costs."""
    return compiled(
        lambda q, k, v, behind, ahead: rj.attention(
            q, k, v, reach=rj.Reach(behind, ahead), backend="reference", return_lse=True
        )
    )


def check(run, heads, dtype, mask_names=tuple(MASKS), **options):
    arrays = cases.inputs(BATCH, LENGTH, *heads, HEAD_DIM, V_DIM, dtype)
    for name in mask_names:
        behind, ahead = MASKS[name]
        expected = cases.expected(*arrays, behind, ahead, **options)
        found = oracle.errors(run(*arrays, behind, ahead), expected)
        if dtype == jnp.float32:
            assert max(found) <= oracle.FLOAT32, (name, found)
            continue
        rounding = oracle.errors(plain()(*arrays, behind, ahead), expected)
        for field, bound in zip(found._fields, [oracle.BFLOAT16_OUT] * 2 + [oracle.BFLOAT16_GRAD] * 3):
            limit = bound * max(getattr(rounding, field), oracle.FLOAT32)
            assert getattr(found, field) <= limit, (name, field, found, rounding)


def product(sizes=(1, 2, 4, 8)):
    """Layouts × ring sizes × heads × types. GQA in float32 has all rings; each other pair of heads and type has one
    ring size with each layout, another from pair to pair, and the rest of the product is slow."""
    pairs = [(heads, dtype) for dtype in ("float32", "bfloat16") for heads in ("gqa", "mha", "mqa")]
    for shift, (heads, dtype) in enumerate(pairs):
        for row, layout in enumerate(rj.layouts.LAYOUTS):
            for ring_size in sizes:
                fast = shift == 0 or ring_size == sizes[(row + shift) % 4]
                yield pytest.param(layout, ring_size, heads, dtype, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize("layout, ring_size, heads, dtype", list(product()))
def test_ring_equals_float64(layout, ring_size, heads, dtype):
    check(ring(layout, ring_size), cases.HEADS[heads], jnp.dtype(dtype))


@pytest.mark.parametrize("strategy, ring_size, options", [
    ("all_gather", 4, {}), ("ulysses", 4, {}), ("ulysses", 8, {}),
    ("hybrid", 8, {"ulysses_size": 2}), ("hybrid", 8, {"ulysses_size": 4}),
])  # fmt: skip
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_strategies_equal_float64(layout, strategy, ring_size, options):
    check(ring(layout, ring_size, strategy=strategy, **options), cases.HEADS["gqa"], jnp.float32)


@pytest.mark.parametrize("heads", [cases.HEADS["mha"], cases.HEADS["mqa"]], ids=["mha", "mqa"])
@pytest.mark.parametrize("strategy", ["all_gather", "ulysses", "hybrid"])
def test_strategies_with_other_heads(strategy, heads):
    options = {"ulysses_size": 4} if strategy == "hybrid" else {}
    check(ring("zigzag", 8, strategy=strategy, **options), heads, jnp.float32)


@pytest.mark.parametrize("strategy", ["all_gather", "ulysses", "hybrid"])
def test_strategies_in_bfloat16(strategy):
    options = {"ulysses_size": 2} if strategy == "hybrid" else {}
    check(ring("striped", 4, strategy=strategy, **options), cases.HEADS["gqa"], jnp.bfloat16)


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("ring_size", [2, 3, 8])
def test_scan_and_unrolled_hops_agree(ring_size, unroll):
    check(ring("striped", ring_size, unroll=unroll), cases.HEADS["gqa"], jnp.float32, ("packed", "full"))


def test_scale_and_softcap():
    options = dict(scale=0.5, softcap=2.0)
    check(ring("zigzag", 4, **options), cases.HEADS["gqa"], jnp.float32, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 7, 12, 30, 1000])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_window_whose_far_hops_are_not_made(layout, window, causal):
    """A static window leaves out rotations; the result is that of the same interval as data."""
    order, size = rj.layouts.get(layout), 8
    arrays = cases.inputs(BATCH, LENGTH, 2, 1, 8, 8)

    def attend(q, k, v):
        q, k, v = (order.permute(x, size, 1) for x in (q, k, v))
        mesh = cases.mesh(size)
        out, lse = rj.sharded_attention(
            q, k, v, mesh=mesh, layout=layout, causal=causal, window=window, return_lse=True
        )
        return order.restore(out, size, 1), order.restore(lse, size, 2)

    g = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
    behind = np.minimum(g, window - 1)
    ahead = np.zeros_like(g) if causal else np.minimum(LENGTH - 1 - g, window - 1)
    found = jax.jit(lambda *a: cases.results(attend, *a))(*arrays)
    assert max(oracle.errors(found, cases.expected(*arrays, behind, ahead))) <= oracle.FLOAT32


@pytest.mark.parametrize("axes, heads", [({"dp": 2, "tp": 2}, (8, 2)), ({"fsdp": 2, "tp": 2}, (8, 1))])
def test_batch_and_heads_are_sharded_too(axes, heads):
    """dp, fsdp and tp beside the ring, also with fewer key/value heads than tensor-parallel devices."""
    behind, ahead = MASKS["packed+window"]
    arrays = cases.inputs(BATCH, LENGTH, *heads, HEAD_DIM, V_DIM)
    order, mesh = rj.layouts.get("striped"), cases.mesh(2, **axes)

    def attend(q, k, v):
        reach = rj.Reach(behind, ahead).permute("striped", 2)
        q, k, v = (order.permute(x, 2, 1) for x in (q, k, v))
        out, lse = rj.sharded_attention(q, k, v, mesh=mesh, reach=reach, return_lse=True)
        return order.restore(out, 2, 1), order.restore(lse, 2, 2)

    found = jax.jit(lambda *a: cases.results(attend, *a))(*arrays)
    assert max(oracle.errors(found, cases.expected(*arrays, behind, ahead))) <= oracle.FLOAT32


def test_explicit_mesh_axes():
    """jax.make_mesh makes axes whose sharding is part of the type; such a mesh works as it is."""
    mesh = jax.make_mesh((2, 4), ("dp", "sp"))
    q, k, v, *_ = cases.inputs(BATCH, LENGTH, 4, 2, 8, 8)
    order = rj.layouts.get("zigzag")
    moved = (order.permute(x, 4, 1) for x in (q, k, v))
    found = order.restore(rj.sharded_attention(*moved, mesh=mesh, layout="zigzag"), 4, 1)
    assert oracle.error(found, rj.attention(q, k, v)) <= oracle.FLOAT32


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_the_callers_shard_map(check_vma):
    mesh, order = cases.mesh(8), rj.layouts.get("striped")
    q, k, v, dout, dlse = cases.inputs(1, 32, 4, 2, 8, 8)
    spec = jax.sharding.PartitionSpec(None, "sp")

    def attend(q, k, v):
        local = functools.partial(rj.ring_attention, axis_name="sp", layout="striped", return_lse=True)
        lse = jax.sharding.PartitionSpec(None, None, "sp")
        mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(spec, lse), check_vma=check_vma)
        out, lse = mapped(*(order.permute(x, 8, 1) for x in (q, k, v)))
        return order.restore(out, 8, 1), order.restore(lse, 8, 2)

    found = jax.jit(lambda *a: cases.results(attend, *a))(q, k, v, dout, dlse)
    g = np.arange(32)[None]
    assert max(oracle.errors(found, cases.expected(q, k, v, dout, dlse, g, 0 * g))) <= oracle.FLOAT32


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=st.sampled_from(list(rj.layouts.LAYOUTS)), ring_size=st.sampled_from([2, 4]))
def test_random_reaches(data, layout, ring_size):
    """Any int32 intervals at all, also inverted ones and such that leave the sequence."""
    length = 16
    entries = st.lists(st.integers(-3, length + 3), min_size=length, max_size=length)
    behind, ahead = (np.array([data.draw(entries)], np.int32) for _ in range(2))
    arrays = cases.inputs(1, length, 2, 1, 8, 8)
    found = ring(layout, ring_size)(*arrays, behind, ahead)
    assert max(oracle.errors(found, cases.expected(*arrays, behind, ahead))) <= oracle.FLOAT32
