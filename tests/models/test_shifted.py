"""Shifted sparse attention against a dense formula in float64, under layouts, rings and tp."""

import dataclasses

import jax
import numpy as np
import pytest

from ringjax.attention import Reach
from ringjax.models import Parallel
from ringjax.models.config import ModelConfig
from ringjax.models.shifted import first_heads, group_reach, shifted_attend
from tests.models import cases
from tests.models.cases import changed

GROUP = 8


def dense(q, k, v, reach, positions, group):
    """Every head by itself, with a mask written from the paper: which group of its document a token is in."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, size = q.shape
    per_key, out = heads // k.shape[2], np.zeros_like(q)
    index = np.arange(length)
    n, _ = first_heads(heads, k.shape[2])
    for b in range(batch):
        g, other = index[:, None], index[None]
        seen = (other >= g - np.asarray(reach.behind)[b][:, None]) & (other <= g + np.asarray(reach.ahead)[b][:, None])
        for head in range(heads):
            shift = 0 if head < n else group // 2
            number = (np.asarray(positions)[b] + shift) // group
            mask = seen & (number[:, None] == number[None])
            scores = q[b, :, head] @ k[b, :, head // per_key].T / np.sqrt(size)
            scores = np.where(mask, scores, -np.inf)
            weights = np.exp(scores - np.max(scores, axis=1, keepdims=True, initial=-1e30, where=mask))
            total = weights.sum(1, keepdims=True)
            weights = np.divide(weights, total, where=total > 0, out=np.zeros_like(weights))
            out[b, :, head] = weights @ v[b, :, head // per_key]
    return out


def drawn(heads, key_heads, length=48, seed=0):
    """Packed documents of 20 and 28 tokens, the second with padding at its end and a span that sees itself."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, length, n, 16)).astype(np.float32) for n in (heads, key_heads, key_heads))
    index = np.arange(length)
    positions = np.broadcast_to(np.where(index < 20, index, index - 20), (2, length))
    behind, ahead = positions.astype(np.int32).copy(), np.zeros((2, length), np.int32)
    behind[1, -3:] = -1
    ahead[0, 25:32] = np.arange(6, -1, -1)
    return q, k, v, positions.astype(np.int32), Reach(behind, ahead)


@pytest.mark.parametrize("heads, key_heads", [(4, 2), (4, 4), (9, 3), (4, 1)])
@pytest.mark.parametrize(
    "layout, shape",
    [("striped", (1, 1, 1, 1)), ("striped", (1, 1, 1, 4)), ("zigzag", (1, 1, 1, 4)), ("contiguous", (2, 1, 1, 4))],
)
def test_the_dense_formula(heads, key_heads, layout, shape):
    q, k, v, positions, reach = drawn(heads, key_heads)
    wanted = dense(q, k, v, reach, positions, GROUP)
    parallel = Parallel(cases.mesh(*shape), layout)
    parts = {"q": q, "k": k, "v": v, "p": positions, "behind": reach.behind, "ahead": reach.ahead}
    x = cases.in_layout(parts, parallel)
    attend = jax.jit(lambda q, k, v, p, b, a: shifted_attend(q, k, v, Reach(b, a), p, GROUP, parallel))
    found = attend(x["q"], x["k"], x["v"], x["p"], x["behind"], x["ahead"])
    np.testing.assert_allclose(found, cases.in_layout({"x": wanted}, parallel)["x"], rtol=2e-5, atol=2e-6)


def test_groups_of_a_document():
    positions = np.arange(10, dtype=np.int32)[None]
    causal = Reach.packed(positions)
    for reach in (causal, None):
        first, other = (group_reach(reach, positions, 4, shift) for shift in (0, 2))
        assert np.asarray(first.behind).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
        assert np.asarray(other.behind).tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2, 3]]
        assert (first.max_behind, first.max_ahead) == (3, 0)
    padding = dataclasses.replace(causal, behind=np.full((1, 10), -1, np.int32))
    assert np.asarray(group_reach(padding, positions, 4, 2).behind).max() == -1


@pytest.mark.parametrize(
    "shape, layout", [((1, 2, 1, 2), "zigzag"), ((1, 2, 2, 2), "striped"), ((2, 1, 1, 4), "contiguous")]
)
def test_a_models_loss_does_not_depend_on_the_mesh(shape, layout):
    config, batch = changed(shifted_group=GROUP), cases.batch()
    plain = cases.hidden(cases.model(config), batch)
    parallel = Parallel(cases.mesh(*shape), layout)
    model = cases.model(config, parallel)
    found = jax.jit(lambda b: cases.hidden(model, b, parallel))(cases.in_layout(batch, parallel))
    wanted = cases.in_layout({"x": np.asarray(plain)}, parallel)["x"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(plain) - np.asarray(cases.hidden(cases.model(), batch))).max() > 0.01
    # Groups as long as the documents, where the other half's is not cut: nothing changes but the shifted heads.
    whole = cases.hidden(cases.model(changed(shifted_group=64)), batch)
    np.testing.assert_allclose(whole, cases.hidden(cases.model(), batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shifted_group": 1}, "shifted_group 1 must be a whole number of at least 2"),
        ({"shifted_group": 9}, "shifted_group 9 is odd"),
        ({"shifted_group": 8, "heads": 1, "kv_heads": 1}, "needs two heads"),
        ({"shifted_group": 8, "window": 4, "sinks": 1}, "is for training, sinks 1 for inference"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(width=16, ffn_width=16, layers=1, **{"heads": 2, **options})
