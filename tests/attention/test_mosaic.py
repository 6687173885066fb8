"""Kernels for Hopper, run by a simulation of a GPU on the CPU: results, blocks that are skipped, and races.

The simulation needs the Pallas of jax 0.11.1 or newer; what the real hardware gave is in docs/results.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.attention import validate
from ringjax.attention.kernels import mosaic
from ringjax.attention.kernels.mosaic import tiles
from tests.attention import cases, oracle

KEYS, BLOCK = 301, 16

simulation = pytest.mark.skipif(
    jax.__version_info__ < mosaic.OLDEST_JAX, reason=f"the simulation needs jax {mosaic.OLDEST_JAX}"
)


def intervals(mask: str, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """lo and hi of every query, beyond the keys too, as a ring gives them."""
    behind, ahead = cases.masks(batch, length)[mask]
    g = np.arange(length)
    return (g - behind).astype(np.int32), (g + ahead + 1).astype(np.int32)


@simulation
@pytest.mark.parametrize("mask, heads, head_dims, length, options", [
    ("causal", (2, 1), (128, 128), 300, {}),
    ("packed+window", (2, 2), (64, 64), 257, {"scale": 0.3}),
    ("sees nothing", (1, 1), (128, 64), 200, {"softcap": 3.0}),
    ("full", (1, 1), (96, 96), 131, {}),
])  # fmt: skip
def test_equals_float64(mask, heads, head_dims, length, options):
    """Odd lengths and head sizes, GQA, softcap: as exact in bfloat16 as `oracle.py` asks."""
    from tests.attention.simulator import simulated

    q, k, v, dout, dlse = cases.inputs(1, length, *heads, *head_dims, jnp.bfloat16)
    lo, hi = intervals(mask, 1, length)
    score = validate.score(options.get("scale"), options.get("softcap"), head_dims[0])
    expected = oracle.attention(q, k, v, lo, hi, dout, np.where((np.maximum(lo, 0) < hi)[:, None], dlse, 0), **options)
    lse = jnp.asarray(expected.lse, jnp.float32)
    delta = jnp.einsum("btnh,btnh->bnt", dout, expected.out).astype(jnp.float32) - jnp.where(jnp.isinf(lse), 0, dlse)
    with simulated():
        found = mosaic.forward(q, k, v, lo, hi, score)
        grads = mosaic.backward(q, k, v, None, lse, dout, delta, lo, hi, score)
    found = oracle.Results(*found, *grads)
    assert found.lse.dtype == jnp.float32 and found.dq.dtype == jnp.bfloat16
    plain = _plain(q, k, v, dout, lse, delta, lo, hi, score)
    errors, rounding = oracle.errors(found, expected), oracle.errors(plain, expected)
    for name, bound in zip(found._fields, [oracle.BFLOAT16_OUT] * 2 + [oracle.BFLOAT16_GRAD] * 3):
        assert getattr(errors, name) <= bound * max(getattr(rounding, name), oracle.FLOAT32), (name, errors, rounding)


def _plain(q, k, v, dout, lse, delta, lo, hi, score) -> oracle.Results:
    from ringjax.attention.kernels import reference

    out, own = reference.forward(q, k, v, lo, hi, score)
    grads = reference.backward(q, k, v, out, lse, dout, delta, lo, hi, score)
    return oracle.Results(out.astype(q.dtype), own, *(x.astype(q.dtype) for x in grads))


@simulation
def test_forward_has_no_races():
    """Of the backward pass the detector says that lse and delta, read by ordinary loads, are overwritten by the copy
    engine without a fence between the two kinds of access; a barrier orders them, as in CUTLASS's pipelines."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    from tests.attention.simulator import simulated

    q, k, v, *_ = cases.inputs(1, 520, 2, 1, 64, 64, jnp.bfloat16)
    with simulated(detect_races=True):
        jax.block_until_ready(mosaic.forward(q, k, v, *intervals("causal", 1, 520), validate.score(None, None, 64)))
    assert not gpu_callbacks.get_races().races_found


@simulation
def test_nothing_is_read_outside_the_intervals():
    """NaN in keys, values and queries that no block of the intervals holds does not come in: they are skipped."""
    from tests.attention.simulator import simulated

    length = 512
    q, k, v, dout, _ = cases.inputs(1, length, 1, 1, 64, 64, jnp.bfloat16)
    g = np.arange(length, dtype=np.int32)[None]
    lo = np.where(g < 256, 0, 384).astype(np.int32)
    hi = np.where(g < 256, np.minimum(g + 1, 128), np.where(g < 384, lo, g + 1)).astype(np.int32)
    hole = (g[0] >= 128) & (g[0] < 384)  # keys that nobody sees, where queries from 256 on see nothing
    poisoned = [jnp.where(hole[None, :, None, None], jnp.nan, x) for x in (k, v)]
    score = validate.score(None, None, 64)
    zeros = jnp.zeros((1, 1, length))
    with simulated():
        clean = mosaic.forward(q, k, v, lo, hi, score)
        dirty = mosaic.forward(q, *poisoned, lo, hi, score)
        clean_grads = mosaic.backward(q, k, v, None, clean.lse, dout, zeros, lo, hi, score)
        dirty_grads = mosaic.backward(q, *poisoned, None, clean.lse, dout, zeros, lo, hi, score)
    assert np.array_equal(clean.out, dirty.out) and np.array_equal(clean.lse, dirty.lse)
    assert np.array_equal(clean_grads.dq, dirty_grads.dq)
    assert all(not np.asarray(x)[:, hole].any() for x in (dirty_grads.dk, dirty_grads.dv))


@pytest.mark.parametrize("tile", [32, 48])
@pytest.mark.parametrize("mask", cases.masks(2, KEYS))
def test_blocks_are_those_that_hold_a_visible_pair(mask, tile):
    """Against the dense mask: no block is missed, none beyond the ends is met, and a full one needs no mask."""
    lo, hi = (np.clip(x, 0, KEYS) for x in intervals(mask, 2, KEYS))
    visible = (np.arange(KEYS) >= lo[..., None]) & (np.arange(KEYS) < hi[..., None])
    bounds = tiles.Tiles.of(jnp.asarray(lo), jnp.asarray(hi), KEYS, tile)
    check_blocks(tiles.key_blocks(bounds, KEYS, BLOCK), visible, tile, BLOCK, whole_only=True)
    transposed = np.swapaxes(visible, 1, 2)
    check_blocks(tiles.query_tiles(bounds, KEYS, BLOCK), transposed, BLOCK, tile, whole_only=False)


def check_blocks(blocks: tiles.Blocks, visible, rows: int, columns: int, whole_only: bool) -> None:
    """`visible` `[B, own, other]`: tiles of `rows` of its own, blocks of `columns` of the other."""
    for b in range(visible.shape[0]):
        for i, begin in enumerate(range(0, visible.shape[1], rows)):
            tile = visible[b, begin : begin + rows]
            pieces = [tile[:, j : j + columns] for j in range(0, tile.shape[1], columns)]
            met = [j for j, piece in enumerate(pieces) if piece.any()]
            first, full_first, full_stop, stop = (int(x[b, i]) for x in blocks)
            assert first <= full_first <= full_stop <= stop
            assert (stop - first == 0) if not met else (first == met[0] and stop == met[-1] + 1)
            for j in range(full_first, full_stop):
                assert pieces[j].all() and (pieces[j].shape[1] == columns or not whole_only)


def test_work_of_a_window_does_not_grow_with_the_length():
    for keys in (4096, 65536):
        g = jnp.arange(keys, dtype=jnp.int32)[None]
        bounds = tiles.Tiles.of(jnp.maximum(g - 1023, 0), g + 1, keys, 128)
        for blocks in (tiles.key_blocks(bounds, keys, 128), tiles.query_tiles(bounds, keys, 128)):
            assert int((blocks.stop - blocks.first).max()) <= 1024 // 128 + 1


def test_what_it_refuses():
    q = jax.ShapeDtypeStruct((1, 256, 8, 128), jnp.bfloat16)
    wide, single = jax.ShapeDtypeStruct((1, 256, 8, 256), jnp.bfloat16), jax.ShapeDtypeStruct(q.shape, jnp.float32)
    score = validate.score(None, None, 128)
    assert mosaic.refuses(q, q, q, score) is None
    assert "float32 is neither" in mosaic.refuses(single, single, single, score)
    assert "head size 256 is above 128" in mosaic.refuses(wide, wide, wide, score)
    assert "scale -1.0 is not positive" in mosaic.refuses(q, q, q, validate.score(-1.0, None, 128))


@simulation
def test_the_kernels_are_lowered_for_cuda(monkeypatch):
    """Inside a ring, both passes, on a machine without a GPU: one forward, one dQ and one dK and dV kernel a hop."""
    import dataclasses

    import ringjax as rj
    from ringjax.attention import kernels

    monkeypatch.setitem(kernels.KERNELS, "mosaic", dataclasses.replace(mosaic.KERNEL, unavailable=lambda: None))
    x = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
    attend = lambda q, k, v: rj.sharded_attention(q, k, v, mesh=cases.mesh(2), backend="mosaic")  # noqa: E731
    both = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout))
    lowered = both.trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    functions = {re.match(r"\w+ @(\w+)", f)[1]: f.count("mosaic_gpu_v2") for f in lowered.split("func.func ")[1:]}
    assert sum(functions.get(name, 0) for name in re.findall(r"call @(\w+)", lowered)) == 2 * 3
    # Both hops call one forward kernel, as a model's layers do: each that is compiled takes a second.
    assert functions["forward"] == 1 and lowered.count("call @forward(") == 2
    assert "stablehlo.case" not in lowered and "stablehlo.if" not in lowered  # nothing waits for the host
