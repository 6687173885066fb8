"""Every backend keeps the contract of kernels.base: any interval, any length, merged lse in the backward pass."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringjax as rj
from ringjax.attention import api, kernels, validate
from ringjax.attention.kernels import base, cudnn, xla
from ringjax.attention.kernels.reference import visible_pairs
from tests.attention import cases, oracle

BACKENDS = [name for name, kernel in kernels.KERNELS.items() if kernel.forward and not kernel.unavailable()]


@pytest.fixture(params=[5, 16, 1024])
def tile(request, monkeypatch):
    """Tiles that do and do not divide the length, and one that holds it all."""
    monkeypatch.setattr(xla, "QUERY_TILE", request.param)
    monkeypatch.setattr(xla, "KEY_CHUNK", request.param + 2)
    api._compiled.clear_cache()
    yield request.param
    api._compiled.clear_cache()


@jax.jit(static_argnums=(0, 1, 2))
def _run(backend, options, tiles, arrays, behind, ahead):
    def attend(q, k, v):
        reach = rj.Reach(behind, ahead)
        return rj.attention(q, k, v, reach=reach, backend=backend, return_lse=True, **dict(options))

    return cases.results(attend, *arrays)


def run(backend, arrays, behind, ahead, **options):
    return _run(backend, tuple(options.items()), (xla.QUERY_TILE, xla.KEY_CHUNK), arrays, behind, ahead)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.7}])
@pytest.mark.parametrize("mask", cases.masks(2, 37))
def test_reference_is_float64_exact(mask, options):
    """The specification itself, against NumPy: nothing but float64 rounding."""
    behind, ahead = cases.masks(2, 37)[mask]
    with jax.enable_x64():
        arrays = tuple(jnp.asarray(x, jnp.float64) for x in cases.inputs(2, 37, 6, 2, 8, 4))
        found = run("reference", arrays, behind, ahead, **options)
        assert found.out.dtype == found.lse.dtype == jnp.float64
    assert max(oracle.errors(found, cases.expected(*arrays, behind, ahead, **options))) <= 1e-13


@pytest.mark.parametrize("heads", cases.HEADS.values(), ids=cases.HEADS)
def test_blockwise_equals_float64(tile, heads):
    arrays = cases.inputs(2, 37, *heads, 8, 4)
    for name, (behind, ahead) in cases.masks(2, 37).items():
        found = oracle.errors(run("xla", arrays, behind, ahead), cases.expected(*arrays, behind, ahead))
        assert max(found) <= oracle.FLOAT32, (name, found)


def test_blockwise_softcap_and_scale(tile):
    arrays = cases.inputs(1, 37, 2, 2, 8, 8)
    behind, ahead = (x[:1] for x in cases.masks(2, 37)["packed"])
    options = {"softcap": 1.5, "scale": 0.7}
    found = run("xla", arrays, behind, ahead, **options)
    assert max(oracle.errors(found, cases.expected(*arrays, behind, ahead, **options))) <= oracle.FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_queries_than_keys_are_the_last_ones(backend):
    q, k, v, dout, dlse = cases.inputs(1, 5, 2, 1, 8, 8, keys=12)
    found = jax.jit(
        lambda *a: cases.results(lambda q, k, v: rj.attention(q, k, v, window=6, backend=backend, return_lse=True), *a)
    )(q, k, v, dout, dlse)
    g = np.arange(7, 12)[None]
    expected = oracle.attention(q, k, v, np.maximum(g - 5, 0), g + 1, dout, dlse)
    assert max(oracle.errors(found, expected)) <= oracle.FLOAT32


@settings(max_examples=12, deadline=None)
@given(keys=st.integers(1, 40), missing=st.integers(0, 39), tile=st.integers(1, 41), groups=st.sampled_from([1, 3]))
def test_random_lengths(keys, missing, tile, groups):
    """Any T ≤ S in tiles of any size, against float64."""
    length = max(1, keys - missing)
    arrays = cases.inputs(1, length, 3, groups, 4, 4, keys=keys, seed=keys)
    g = keys - length + np.arange(length, dtype=np.int32)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "QUERY_TILE", tile)
        patch.setattr(xla, "KEY_CHUNK", tile)
        api._compiled.clear_cache()
        found = run("xla", arrays, g, 0 * g)
    api._compiled.clear_cache()
    expected = oracle.attention(*arrays[:3], 0 * g, g + 1, *arrays[3:])
    assert max(oracle.errors(found, expected)) <= oracle.FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v, dout, dlse = cases.inputs(1, 16, 1, 1, 8, 8)
    arrays = (100 * q, 100 * k, v, dout, dlse)
    g = np.arange(16, dtype=np.int32)[None]
    found = oracle.errors(run(backend, arrays, g, 0 * g), cases.expected(*arrays, g, 0 * g))
    assert max(found) <= 1e-2, found  # float32 scores of 1e4 are off by 1e-3, and p by as much


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing(backend):
    arrays = cases.inputs(1, 8, 2, 1, 4, 4)
    blind = np.full((1, 8), -1, np.int32)
    found = run(backend, arrays, blind, 0 * blind)
    assert jnp.isneginf(found.lse).all()
    assert all((x == 0).all() for x in (found.out, found.dq, found.dk, found.dv))


def test_work_follows_the_interval():
    """Chunks outside every interval are not computed: the loop bounds of a window do not grow with the length."""
    cut = xla.Cut.of(4096, 64)
    for start in (0, 1000, 4000):
        lo = jnp.full((1, 64), start)
        first, last = xla._chunks_within(cut, lo, lo + 96)
        assert last - first <= 3
    first, last = xla._chunks_within(cut, lo, lo)
    assert last <= first


def test_visible_pairs_counts_the_useful_work():
    lo, hi = np.array([[0, 0, 2, 5]]), np.array([[1, 2, 3, 4]])
    assert visible_pairs(lo, hi).tolist() == [4]


def test_lse_is_the_log_of_the_sum():
    q, k, v, *_ = cases.inputs(1, 8, 1, 1, 4, 4)
    _, lse = rj.attention(q, k, v, return_lse=True)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / 2
    sums = [np.log(np.exp(scores[0, 0, t, : t + 1]).sum()) for t in range(8)]
    np.testing.assert_allclose(lse[0, 0], sums, rtol=1e-5)


def test_auto_says_what_it_chose(caplog):
    with caplog.at_level(logging.DEBUG, logger="ringjax.attention.kernels"):
        q = jnp.zeros((1, 3, 1, 2))
        rj.attention(q, q, q)
    assert "attention backend 'xla' for q (1, 3, 1, 2)" in caplog.text


def test_available_gives_reasons():
    found = kernels.available()
    assert list(found) == ["cudnn", "mosaic", "splash", "xla", "reference"]
    assert found["xla"] is None and found["reference"] is None
    if jax.default_backend() == "cpu":
        assert found["cudnn"] == "needs an NVIDIA GPU, not a cpu"
        assert found["mosaic"] == "needs an NVIDIA Hopper GPU, not a cpu"


def test_a_named_backend_that_cannot_serve_says_why(monkeypatch):
    refuses = lambda q, k, v, score: "head size 2 is too small"  # noqa: E731
    refusing = kernels.Kernel("refusing", xla.forward, xla.backward, refuses=refuses)
    monkeypatch.setitem(kernels.KERNELS, "refusing", refusing)
    q = jnp.zeros((1, 3, 1, 2))
    with pytest.raises(NotImplementedError, match="'refusing' cannot serve this call: head size 2 is too small"):
        rj.attention(q, q, q, backend="refusing")


@pytest.mark.parametrize("dense, said", [
    (False, "attention falls back from 'mosaic' to the slower 'xla'"),
    (True, "attention that 'cudnn' cannot serve (not full or causal) falls back from 'mosaic' to the slower 'xla'"),
])  # fmt: skip
def test_auto_warns_once_on_a_gpu_without_the_fused_kernel_for_any_mask(monkeypatch, caplog, dense, said):
    monkeypatch.setattr(kernels, "target", lambda: base.Target("gpu", "NVIDIA A100"))
    if dense:
        monkeypatch.setitem(kernels.KERNELS, "cudnn", dataclasses.replace(cudnn.KERNEL, unavailable=lambda: None))
    kernels._warn.cache_clear()
    q = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    for _ in range(2):
        assert kernels.choose("auto", q, q, q, validate.score(None, None, 64)).interval.name == "xla"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage().startswith(f"{said}: needs an NVIDIA Hopper GPU")
