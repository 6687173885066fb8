"""The algebra of partial results: associative, commutative, neutral element, gradients, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import ringjax as rj
from ringjax.attention.merge import empty, merge_across
from tests.attention import cases, oracle

B, T, N, H = 2, 3, 4, 5


def part(seed: int, holes: float = 0.3, scale: float = 1.0) -> rj.Partial:
    draw = np.random.default_rng(seed)
    lse = (scale * draw.standard_normal((B, N, T))).astype(np.float32)
    lse[draw.random(lse.shape) < holes] = -np.inf
    out = draw.standard_normal((B, T, N, H)).astype(np.float32)
    out[np.isneginf(lse).transpose(0, 2, 1)] = 0
    return rj.Partial(jnp.asarray(out), jnp.asarray(lse))


def close(a, b, tolerance=1e-6):
    assert oracle.error(a[0], b[0]) <= tolerance and oracle.error(a[1], b[1]) <= tolerance


def test_merge_is_attention_over_the_union():
    q, k, v, dout, dlse = cases.inputs(1, 8, 2, 1, 4, 4)
    halves = [rj.attention(q, k[:, s], v[:, s], reach=rj.Reach.full(1, 8), return_lse=True)
              for s in (slice(0, 3), slice(3, 8))]  # fmt: skip
    close(rj.merge(*halves), rj.attention(q, k, v, causal=False, return_lse=True))


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(0, 10**6)] * 3), st.sampled_from([1.0, 50.0, 1e4]))
def test_associative_and_commutative(seeds, scale):
    a, b, c = (part(seed, scale=scale) for seed in seeds)
    close(rj.merge(rj.merge(a, b), c), rj.merge(a, rj.merge(b, c)), 1e-5)
    close(rj.merge(a, b), rj.merge(b, a))


def test_empty_is_neutral():
    a, nothing = part(0), empty(B, T, N, H)
    close(rj.merge(a, nothing), a, 0)
    close(rj.merge(nothing, a), a, 0)
    both = rj.merge(nothing, nothing)
    assert (both.out == 0).all() and jnp.isneginf(both.lse).all()


@pytest.mark.parametrize("holes", [0.0, 0.5, 1.0])
def test_gradients_are_right_and_finite(holes):
    """Also where both sides are empty; against finite differences in float64."""
    with jax.enable_x64():
        a, b = (rj.Partial(*(jnp.asarray(x, jnp.float64) for x in part(seed, holes))) for seed in (1, 2))

        def total(a, b):
            out, lse = rj.merge(a, b)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + jnp.where(
                jnp.isneginf(lse), 0, jnp.sin(lse)
            ).sum()

        grads = jax.grad(total, argnums=(0, 1))(a, b)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
        if holes == 0:
            check_grads(total, (a, b), order=1, modes=["rev"])


def test_bfloat16_parts_are_merged_in_float32():
    a, b = (rj.Partial(p.out.astype(jnp.bfloat16), p.lse) for p in (part(3), part(4)))
    merged = rj.merge(a, b)
    assert merged.out.dtype == merged.lse.dtype == jnp.float32
    close(merged, rj.merge(rj.Partial(a.out.astype(jnp.float32), a.lse), b), 0)


def test_merge_across_devices_equals_merge_one_by_one():
    parts = [part(seed) for seed in range(8)]
    expected = parts[0]
    for p in parts[1:]:
        expected = rj.merge(expected, p)
    spec = jax.sharding.PartitionSpec("sp")
    across = jax.shard_map(
        lambda p: merge_across(jax.tree.map(lambda x: x[0], p), "sp"),
        mesh=cases.mesh(8), in_specs=spec, out_specs=jax.sharding.PartitionSpec(),
    )  # fmt: skip
    close(jax.jit(across)(jax.tree.map(lambda *x: jnp.stack(x), *parts)), expected, 1e-5)
