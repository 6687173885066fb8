"""Hops that are known before the data are: their rectangles, and kernels that serve nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax.attention import api, kernels, validate
from ringjax.attention.kernels import reference
from ringjax.attention.kernels.base import Dense, Gradients, Kernel
from ringjax.attention.merge import Partial
from tests.attention import cases, oracle

BATCH, LENGTH = 2, 32


def bounds(q, k, causal: bool):
    length, keys = q.shape[1], k.shape[1]
    hi = 1 + np.arange(length) if causal else np.full(length, keys)
    hi = np.broadcast_to(hi.astype(np.int32), (q.shape[0], length))
    return np.zeros_like(hi), hi


def forward(q, k, v, causal, score):
    out, lse = reference.forward(q, k, v, *bounds(q, k, causal), score)
    return Partial(out.astype(q.dtype), lse.astype(jnp.float32))


def backward(q, k, v, out, lse, dout, delta, causal, score):
    """As a library kernel does it: the delta it is given is not looked at."""
    del delta
    delta = jnp.einsum("btnh,btnh->bnt", out, dout, preferred_element_type=jnp.float32)
    grads = reference.backward(q, k, v, out, lse, dout, delta, *bounds(q, k, causal), score)
    return Gradients(*(x.astype(q.dtype) for x in grads))


DENSE = Kernel("dense", None, None, dense=Dense(forward, backward, takes_delta=False), fused=True)


def rounded(function):
    """A kernel's function with its results in the type of the inputs, but lse."""

    def call(q, *rest):
        found = function(q, *rest)
        return type(found)(*(x if x.ndim == 3 else x.astype(q.dtype) for x in found))

    return call


FUSED = Kernel("fused", rounded(reference.forward), rounded(reference.backward), fused=True, separate=True)


@pytest.fixture(params=["alone", pytest.param("beside xla", marks=pytest.mark.slow), "beside a fused one"])
def dense(request, monkeypatch):
    """A kernel for rectangles only, as the one backend or as the first choice of 'auto'."""
    others = {"fused": FUSED} if request.param == "beside a fused one" else kernels.KERNELS
    monkeypatch.setattr(kernels, "KERNELS", {"dense": DENSE, **others})
    api._compiled.clear_cache()
    api._sharded.clear_cache()
    yield "dense" if request.param == "alone" else "auto"
    api._compiled.clear_cache()
    api._sharded.clear_cache()


@pytest.fixture
def beside_fused(monkeypatch):
    """A kernel for rectangles and a fused one for intervals, as on a Hopper GPU."""
    monkeypatch.setattr(kernels, "KERNELS", {"dense": DENSE, "fused": FUSED})
    api._compiled.clear_cache()
    api._sharded.clear_cache()
    yield
    api._compiled.clear_cache()
    api._sharded.clear_cache()


@pytest.mark.parametrize("ring_size", [2, 4])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_patterns_are_what_the_intervals_say(layout, ring_size):
    """Every (query shard, key shard) pair: the rectangle sees the pairs that slots_below counts, and no others."""
    order, length = rj.layouts.get(layout), LENGTH // ring_size
    patterns = order.causal_patterns(length)
    for shard in range(ring_size):
        stop = order.slots(shard, ring_size, length) + 1
        for source in range(ring_size):
            hi = np.asarray(order.slots_below(stop, source, ring_size, length))
            expected = np.arange(length) < hi[:, None]
            pattern = patterns[1 + np.sign(source - shard)]
            found = np.zeros((length, length), bool)
            if pattern is not None:
                rows, columns = slice(*pattern.queries), slice(*pattern.keys)
                seen = np.ones((length, length), bool)[rows, columns]
                found[rows, columns] = np.tril(seen) if pattern.causal else seen
            assert np.array_equal(found, expected), (shard, source)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("ring_size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_ring_of_dense_hops(dense, layout, ring_size, unroll, causal):
    check(dense, layout, ring_size, causal, unroll=unroll)


@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
@pytest.mark.parametrize("strategy, options", [
    ("ulysses", {}), ("hybrid", {"ulysses_size": 2}), ("two_level", {"host_size": 2}), ("all_gather", {}),
])  # fmt: skip
def test_other_strategies(dense, strategy, options, layout):
    if dense == "dense" and (strategy == "all_gather" or (strategy, layout) == ("hybrid", "striped")):
        with pytest.raises(NotImplementedError, match="'dense' serves hops in which .* use backend='auto'"):
            check(dense, layout, 4, True, strategy=strategy, **options)
        return
    check(dense, layout, 4, True, strategy=strategy, **options)


@pytest.mark.parametrize("layout, unroll", [
    ("contiguous", False), ("striped", False), ("zigzag", False), ("zigzag", True),
    *(pytest.param(layout, True, marks=pytest.mark.slow) for layout in ("contiguous", "striped")),
])  # fmt: skip
def test_sums_over_hops_are_float32(dense, layout, unroll):
    """Kernels that round every hop's result to bfloat16 lose no more than one such rounding: sums are not rounded."""
    rounding = 2.0**-9  # of one bfloat16; the inputs' own is in the expected result too
    check(dense, layout, 8, True, dtype=jnp.bfloat16, bound=2 * rounding, unroll=unroll)


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("ring_size, window", [(2, 9), (4, 20)])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_windows_find_dq_apart(beside_fused, layout, ring_size, window, unroll):
    check("auto", layout, ring_size, True, window=window, unroll=unroll)


@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
@pytest.mark.parametrize("mask, branches", [("causal", 1), ("full", 0), ("window", 0), ("data", 2)])
def test_branches_of_a_program(beside_fused, layout, mask, branches):
    """A GPU waits for the host at each: none forward, and backward only where a rectangle may be worth it."""
    q, k, v, dout, _ = cases.inputs(BATCH, LENGTH, 8, 4, 8, 8)
    reach = rj.Reach.causal(BATCH, LENGTH).permute(layout, 2) if mask == "data" else None
    options = dict(causal=mask != "full", window=9 if mask == "window" else None, reach=reach)

    def attend(q, k, v):
        return rj.sharded_attention(q, k, v, mesh=cases.mesh(2), layout=layout, **options)

    assert str(jax.make_jaxpr(attend)(q, k, v)).count(" cond[") == 0
    pull = jax.vjp(attend, q, k, v)[1]
    assert str(jax.make_jaxpr(pull)(dout)).count(" cond[") == branches


def check(backend, layout, ring_size, causal, dtype=jnp.float32, bound=oracle.FLOAT32, window=None, **options):
    arrays = cases.inputs(BATCH, LENGTH, 8, 4, 8, 8, dtype)
    order, mesh = rj.layouts.get(layout), cases.mesh(ring_size)

    def attend(q, k, v):
        q, k, v = (order.permute(x, ring_size, 1) for x in (q, k, v))
        out = rj.sharded_attention(
            q, k, v, mesh=mesh, layout=layout, causal=causal, window=window, backend=backend, **options
        )
        return order.restore(out, ring_size, 1)

    found = jax.jit(lambda q, k, v, dout: run(attend, q, k, v, dout))(*arrays[:4])
    g = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
    behind = g if window is None else np.minimum(g, window - 1)
    expected = cases.expected(*arrays[:4], 0 * arrays[4], behind, 0 * g if causal else LENGTH - 1 - g)
    expected = (expected.out, expected.dq, expected.dk, expected.dv)
    errors = [oracle.error(a, b) for a, b in zip(found, expected)]
    assert max(errors) <= bound, errors


def run(attend, q, k, v, dout):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)


@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
@pytest.mark.parametrize("ring_size", [1, 4])
def test_a_reach_that_is_causal_takes_the_fast_way(monkeypatch, layout, ring_size):
    """With a reach, which is data, 'auto' looks at run time: dense kernels where it is plain, intervals elsewhere."""
    poisoned = dataclasses.replace(
        kernels.KERNELS["xla"], forward=lambda q, *rest: Partial(*(x * jnp.nan for x in reference.forward(q, *rest)))
    )
    monkeypatch.setattr(kernels, "KERNELS", {"dense": DENSE, "xla": poisoned})
    api._compiled.clear_cache()
    api._sharded.clear_cache()
    q, k, v, *_ = cases.inputs(BATCH, LENGTH, 4, 2, 8, 8)
    order, mesh = rj.layouts.get(layout), cases.mesh(ring_size)

    @jax.jit
    def attend(q, k, v, positions):
        reach = rj.Reach.packed(positions).permute(layout, ring_size)
        q, k, v = (order.permute(x, ring_size, 1) for x in (q, k, v))
        out = rj.sharded_attention(q, k, v, mesh=mesh, layout=layout, reach=reach)
        return order.restore(out, ring_size, 1)

    g = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
    expected = forward(q, k, v, True, validate.score(None, None, 8)).out
    assert oracle.error(attend(q, k, v, g), expected) <= oracle.FLOAT32
    packed = attend(q, k, v, g % 20)
    assert np.isnan(packed).any()
    api._compiled.clear_cache()
    api._sharded.clear_cache()


def test_lse_has_no_gradient_where_the_kernel_has_none(dense):
    q, k, v, *_ = cases.inputs(1, 8, 2, 1, 4, 4)

    def lse_too(q):
        out, lse = rj.attention(q, k, v, backend=dense, return_lse=True)
        return out.sum() + lse.sum()

    if dense == "dense":
        with pytest.raises(NotImplementedError, match="no gradient of lse.*leave it out, or use backend='auto'"):
            jax.grad(lse_too)(q)
    else:
        other = next(n for n, kernel in kernels.KERNELS.items() if kernel.forward and not kernel.unavailable())
        expected = jax.grad(lambda q: sum(x.sum() for x in rj.attention(q, k, v, backend=other, return_lse=True)))(q)
        assert oracle.error(jax.grad(lse_too)(q), expected) <= oracle.FLOAT32


def test_masks_that_are_no_rectangles_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", {"dense": DENSE})
    q, k, v, *_ = cases.inputs(1, 8, 2, 1, 4, 4)
    for options in ({"window": 3}, {"reach": rj.Reach.causal(1, 8)}):
        with pytest.raises(NotImplementedError, match="this call's mask is data, a window"):
            rj.attention(q, k, v, backend="dense", **options)
    with pytest.raises(NotImplementedError, match="does not serve decoding"):
        rj.decode_attention(q[:, -1:], k, v, lengths=jnp.array([8]), backend="dense")
