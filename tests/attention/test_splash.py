"""Kernels for TPU, interpreted on the CPU: results, the blocks that are visited, and what is refused.

What they compile to for a TPU is in test_tpu.py.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import ringjax as rj
from ringjax.attention import kernels, validate
from ringjax.attention.kernels import base, splash
from ringjax.attention.kernels.splash.visits import Cut, Order, blocks_seen, visits
from tests.attention import cases, oracle

BATCH, LENGTH, TILE, BLOCK = 2, 300, 128, 128  # three tiles and three blocks, the last ones with padding
HEAD_DIM, V_DIM = 16, 8
MASKS = cases.masks(BATCH, LENGTH)
OPTIONS = {"query_tile": TILE, "key_block": BLOCK}


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """`backend="splash"` runs the kernels in JAX, with the smallest tiles there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.KERNELS, "splash", splash.kernel(interpret=True, **OPTIONS))
        yield


@functools.cache
def compiled(backend: str, **options):
    """The reach is data: one compiled function for all masks."""

    def attend(arrays, behind, ahead):
        reach = rj.Reach(behind, ahead)
        run = lambda q, k, v: rj.attention(q, k, v, reach=reach, backend=backend, return_lse=True, **options)  # noqa: E731
        return cases.results(run, *arrays)

    return jax.jit(attend)


def check(arrays, mask: str, found=None, **options):
    behind, ahead = (x[:, : arrays[0].shape[1]] for x in MASKS[mask])
    expected = cases.expected(*arrays, behind, ahead, **options)
    found = compiled("splash", **options)(arrays, behind, ahead) if found is None else found
    errors = oracle.errors(found, expected)
    if arrays[0].dtype == jnp.float32:
        assert max(errors) <= oracle.FLOAT32, (mask, errors)
        return
    rounding = oracle.errors(compiled("reference", **options)(arrays, behind, ahead), expected)
    for name, bound in zip(errors._fields, [oracle.BFLOAT16_OUT] * 2 + [oracle.BFLOAT16_GRAD] * 3):
        limit = bound * max(getattr(rounding, name), oracle.FLOAT32)
        assert getattr(errors, name) <= limit, (mask, name, errors, rounding)


@pytest.mark.parametrize("dtype, heads", [
    (jnp.float32, (4, 4)), (jnp.float32, (4, 2)), (jnp.float32, (4, 1)), (jnp.bfloat16, (4, 2)),
    *(pytest.param(jnp.bfloat16, heads, marks=pytest.mark.slow) for heads in [(4, 4), (4, 1)]),
])  # fmt: skip
def test_equals_float64(heads, dtype):
    arrays = cases.inputs(BATCH, LENGTH, *heads, HEAD_DIM, V_DIM, dtype)
    for mask in MASKS:
        check(arrays, mask)


def test_softcap_and_scale():
    check(cases.inputs(BATCH, LENGTH, 2, 1, HEAD_DIM, HEAD_DIM), "packed", softcap=1.5, scale=0.7)


def test_results_are_float32_and_rows_that_see_nothing_are_zero():
    q, k, v, dout, _ = cases.inputs(1, 200, 2, 1, HEAD_DIM, V_DIM, jnp.bfloat16, keys=130)
    lo, score = jnp.full((1, 200), 7, jnp.int32), validate.score(None, None, HEAD_DIM)
    kernel = kernels.KERNELS["splash"]
    out, lse = jax.jit(kernel.forward, static_argnums=5)(q, k, v, lo, lo, score)
    delta = jnp.zeros(lse.shape)
    grads = jax.jit(kernel.backward, static_argnums=9)(q, k, v, None, lse, dout, delta, lo, lo, score)
    assert jnp.isneginf(lse).all()
    for x in (out, *grads):
        assert x.dtype == jnp.float32 and not x.any()


def test_large_scores_do_not_overflow():
    """Without a maximum subtracted, exp of these is infinite."""
    q, k, v, dout, dlse = cases.inputs(1, 140, 1, 1, 8, 8)
    arrays = (60 * q, 60 * k, v, dout, dlse)
    g = np.arange(140, dtype=np.int32)[None]
    found = oracle.errors(compiled("splash")(arrays, g, 0 * g), cases.expected(*arrays, g, 0 * g))
    assert max(found) <= 1e-2, found  # float32 scores of 1e4 are off by 1e-3, and p by as much


def test_reads_nothing_that_was_not_written(monkeypatch):
    """The interpreter that knows a TPU's memory: it starts as NaN, and reads outside of arrays are errors. The steps of
    the grids are the blocks that are seen, and no more."""
    steps = []

    def record(token, point, core):
        steps.append(tuple(map(int, point)))
        return token

    interpret = pltpu.InterpretParams(grid_point_recorder=record)
    monkeypatch.setitem(kernels.KERNELS, "splash", splash.kernel(interpret=interpret, **OPTIONS))
    arrays = cases.inputs(1, LENGTH, 2, 1, HEAD_DIM, V_DIM)
    behind, ahead = (x[:1] for x in MASKS["packed+window"])
    run = lambda q, k, v: rj.attention(  # noqa: E731
        q, k, v, reach=rj.Reach(behind, ahead), backend="splash", return_lse=True
    )
    found = jax.block_until_ready(jax.jit(lambda *a: cases.results(run, *a))(*arrays))
    assert max(oracle.errors(found, cases.expected(*arrays, behind, ahead))) <= oracle.FLOAT32
    assert len(steps) == 3 * 2 * 5  # forward, dQ, dK with dV; heads; the diagonal of 3 × 3 and the two below it


def order(queries: int, keys: int, by_keys: bool = False, tile: int = TILE) -> Order:
    return Order(Cut.of(queries, tile), Cut.of(keys, tile), by_keys)


def pairs(order: Order, lo, hi) -> list[tuple[int, int, int, bool]]:
    found = visits(order, lo, hi)
    codes = np.asarray(found.codes)
    assert (codes[int(found.count) :] == codes[int(found.count) - 1]).all()
    codes = codes[: int(found.count)]
    fields = order.row(codes), order.tile(codes), order.block(codes), order.whole(codes)
    return [tuple(map(int, visit)) for visit in zip(*fields)]


def test_visits_are_those_of_the_drawing():
    """Causal with a window, four tiles and blocks: the example of visits.py."""
    g = np.arange(512)[None]
    lo, hi = np.maximum(g - 255, 0), g + 1
    seen = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    assert [(tile, block) for _, tile, block, _ in pairs(order(512, 512), lo, hi)] == seen
    by_keys = [(tile, block) for _, tile, block, _ in pairs(order(512, 512, by_keys=True), lo, hi)]
    assert by_keys == sorted(seen, key=lambda pair: pair[::-1])
    assert [pair for _, *pair, whole in pairs(order(512, 512), lo, hi) if whole] == [[1, 0], [2, 1], [3, 2]]


@pytest.mark.parametrize("by_keys", [False, True], ids=["by queries", "by keys"])
def test_visits_are_the_blocks_that_somebody_sees(by_keys):
    """Two rows with different documents: no block is visited in vain, but one a result that has none."""
    for name, (behind, ahead) in cases.masks(2, 512).items():
        g = np.arange(512)
        lo, hi = np.clip(g - behind, 0, 512), np.clip(g + ahead + 1, 0, 512)
        slot = np.arange(512)
        visible = (slot >= lo[..., None]) & (slot < hi[..., None])
        blocks = visible.reshape(2, 4, 128, 4, 128)
        some, every = blocks.any((2, 4)), blocks.all((2, 4))
        found = pairs(order(512, 512, by_keys), lo, hi)
        assert {(row, tile, block) for row, tile, block, _ in found} == set(map(tuple, np.argwhere(some).tolist()))
        assert all(every[row, tile, block] == whole for row, tile, block, whole in found), name


def test_somebody_writes_the_zeros_of_tiles_and_blocks_without_visits():
    lo = hi = np.zeros((2, 256), np.int32)
    assert pairs(order(256, 384), lo, hi) == [(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)]
    by_keys = pairs(order(256, 384, by_keys=True), lo, hi)
    assert [pair[:3] for pair in by_keys] == [(row, 0, block) for row in (0, 1) for block in (0, 1, 2)]


def test_work_follows_the_window_not_the_length():
    """Twice the length with the same window is twice the blocks, not four times."""

    def count(length: int) -> int:
        g = np.arange(length)[None]
        return len(pairs(order(length, length, tile=512), np.maximum(g - 1023, 0), g + 1))

    assert count(8192) == 3 * 16 - 3 and count(16384) == 3 * 32 - 3


def test_nothing_is_as_large_as_queries_times_keys():
    lo = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    jaxpr = jax.make_jaxpr(functools.partial(blocks_seen, order(4096, 4096)))(lo, lo)
    assert max(np.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars) <= 4096


@pytest.mark.parametrize("length, at_most, cut", [
    (8192, 1024, (1024, 8)), (300, 1024, (384, 1)), (1000, 512, (512, 2)), (1100, 512, (384, 3)), (1, 512, (128, 1)),
])  # fmt: skip
def test_lengths_are_padded_as_little_as_tiles_allow(length, at_most, cut):
    found = Cut.of(length, at_most)
    assert (found.size, found.count) == cut and found.padded >= length


@pytest.mark.parametrize("layout, unroll", [
    ("contiguous", False), ("striped", False), ("zigzag", True),
    *(pytest.param(layout, layout != "zigzag", marks=pytest.mark.slow) for layout in rj.layouts.LAYOUTS),
])  # fmt: skip
def test_ring(layout, unroll):
    """What the hops of each layout make of every mask. `check_vma` is off: Pallas' interpreter cannot work with it."""
    ring_size, length = 4, 1024
    order, masks = rj.layouts.get(layout), cases.masks(1, length)
    arrays = cases.inputs(1, length, 2, 1, HEAD_DIM, V_DIM)
    tokens, rows = P(None, "sp"), P(None, None, "sp")

    def local(q, k, v, behind, ahead):
        return rj.ring_attention(
            q, k, v, axis_name="sp", layout=layout, reach=rj.Reach(behind, ahead), backend="splash", return_lse=True,
            unroll=unroll,
        )  # fmt: skip

    def attend(behind, ahead, q, k, v):
        mapped = jax.shard_map(
            local, mesh=cases.mesh(ring_size), in_specs=tokens, out_specs=(tokens, rows), check_vma=False
        )
        out, lse = mapped(*(order.permute(x, ring_size, 1) for x in (q, k, v, behind, ahead)))
        return order.restore(out, ring_size, 1), order.restore(lse, ring_size, 2)

    run = jax.jit(lambda arrays, behind, ahead: cases.results(functools.partial(attend, behind, ahead), *arrays))
    for name in masks if layout == "striped" else ("packed+window", "image spans", "full"):
        found = oracle.errors(run(arrays, *masks[name]), cases.expected(*arrays, *masks[name]))
        assert max(found) <= oracle.FLOAT32, (name, found)


def shapes(length=256, keys=256, head_dim=64, v_dim=64, dtype=jnp.bfloat16, batch=1):
    found = (batch, length, 4, head_dim), (batch, keys, 2, head_dim), (batch, keys, 2, v_dim)
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in found)


@pytest.mark.parametrize("options, reason", [
    ({}, None), ({"dtype": jnp.float32, "v_dim": 256}, None), ({"head_dim": 512}, None), ({"head_dim": 72}, None),
    ({"dtype": jnp.float16}, "dtype float16; it takes bfloat16 and float32"),
    ({"head_dim": 12}, "head size 12 of q and k; in bfloat16 it takes multiples of 8 up to 512"),
    ({"dtype": jnp.float32, "v_dim": 512}, "head size 512 of v; in float32 it takes multiples of 8 up to 256"),
    ({"length": 2**18, "keys": 2**18}, None),
    ({"length": 2**18, "keys": 2**18, "batch": 2}, "make 262144 pairs of tile and block, more than the 131072"),
])  # fmt: skip
def test_refuses_by_name(options, reason):
    found = splash.KERNEL.refuses(*shapes(**options), validate.score(None, None, 64))
    assert found is None if reason is None else reason in found


def test_is_for_tpus():
    assert splash.KERNEL.unavailable() == "it runs on TPUs, and this is a cpu"


def test_auto_prefers_it_on_a_tpu_and_warns_once_where_it_refuses(monkeypatch, caplog):
    monkeypatch.setitem(kernels.KERNELS, "splash", splash.KERNEL)
    for module in (base, kernels):
        monkeypatch.setattr(module, "target", lambda: base.Target("tpu", "TPU v5"))
    kernels._warn.cache_clear()
    score = validate.score(None, None, 64)
    assert kernels.choose("auto", *shapes(), score).interval is splash.KERNEL and not caplog.records
    for _ in range(2):
        assert kernels.choose("auto", *shapes(head_dim=12), score).interval.name == "xla"
    (record,) = caplog.records
    said = "attention falls back from 'splash' to the slower 'xla': head size 12 of q and k"
    assert record.levelno == logging.WARNING and record.getMessage().startswith(said)


def test_auto_is_quiet_elsewhere(caplog):
    q = jnp.zeros((1, 3, 1, 2))
    with caplog.at_level(logging.INFO):
        rj.attention(q, q, q)
    assert not caplog.records
