"""Chunked cross-entropy against the dense formula in float64, on one device and on meshes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringjax.models import Parallel
from ringjax.training.loss import LossSums, _Tokens, cross_entropy, token_nll
from tests.models import cases, oracle
from tests.models.cases import SMALL, changed


def states(rows=8, length=32, width=SMALL.width, dtype=np.float32):
    return np.random.default_rng(5).standard_normal((rows, length, width)).astype(dtype)


def plain(params, config, hidden, batch):
    """Loss and its gradients with respect to the hidden states and the head's matrices, float64."""
    vision, weights = batch["target_modality"], batch["loss_weights"].astype(np.float64)
    loss = np.sum(weights * oracle.nll(params, config, hidden, batch)) / weights.sum()
    dhidden, dkernels = np.zeros(hidden.shape), {}
    for table, head, here in (("wte", "lm_head", ~vision), ("vte", "vision_head", vision)):
        kernel = params[f"{table}/embedding"].T if config.tie_embeddings else params[f"{head}/kernel"]
        logits = hidden @ kernel
        softmax = np.exp(logits - logits.max(-1, keepdims=True))
        softmax /= softmax.sum(-1, keepdims=True)
        onehot = np.eye(kernel.shape[1])[np.where(here, batch["targets"], 0)]
        dlogits = (softmax - onehot) * (weights * here / weights.sum())[..., None]
        dhidden += dlogits @ kernel.T
        dkernels[table] = np.einsum("btd,btv->dv", hidden, dlogits)
    return loss, dhidden, dkernels


def ours(model, hidden, batch, parallel, chunk):
    graph, state = nnx.split(model)

    def loss(state, hidden, batch):
        return cross_entropy(nnx.merge(graph, state), hidden, batch, parallel=parallel, chunk=chunk).loss

    loss, (gradient, dhidden) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, hidden, batch)
    return float(loss), dhidden, gradient


@pytest.mark.parametrize(
    "shape, layout, chunk, tied",
    [
        (None, "striped", 7, False),
        (None, "striped", 10_000, True),
        ((8, 1, 1, 1), "striped", 5, False),
        ((1, 2, 2, 2), "striped", 3, False),
        ((1, 2, 2, 2), "striped", 3, True),
        ((1, 1, 4, 2), "contiguous", 64, True),
        ((2, 1, 1, 4), "zigzag", 7, False),
        ((1, 1, 1, 8), "striped", 1, False),
    ],
)
def test_equals_the_dense_formula(shape, layout, chunk, tied):
    parallel = Parallel(None if shape is None else cases.mesh(*shape), layout)
    config, batch = changed(tie_embeddings=tied), cases.batch(rows=8)
    model, hidden = cases.model(config, parallel), states()
    expected, dhidden_expected, dkernels = plain(oracle.parameters(model), config, hidden.astype(np.float64), batch)
    loss, dhidden, gradient = ours(
        model, cases.in_layout({"x": hidden}, parallel)["x"], cases.in_layout(batch, parallel), parallel, chunk
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    close(dhidden, cases.in_layout({"x": dhidden_expected}, parallel)["x"])
    heads = (gradient.wte.embedding, gradient.vte.embedding) if tied else ()
    heads = heads or (gradient.lm_head.kernel, gradient.vision_head.kernel)
    for head, table in zip(heads, ("wte", "vte")):
        close(head[...], dkernels[table].T if tied else dkernels[table])


def close(found, expected):
    """Relative error of the whole at most 1e-5."""
    found = np.asarray(found, np.float64)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def avals(jaxpr):
    """Everything that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (out.aval for out in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from avals(inner)


@pytest.mark.parametrize("shape", [None, (1, 1, 2, 4)])
def test_no_array_of_tokens_times_vocabulary_exists(shape):
    """Neither forward nor backward, on the whole or on one device."""
    config, length, chunk = changed(width=8, head_dim=8, vocab_size=512, vision_vocab_size=256), 256, 8
    parallel = Parallel(None if shape is None else cases.mesh(*shape))
    model, batch = cases.model(config, parallel), cases.batch(config, rows=1, length=length)
    graph, state = nnx.split(model)

    def step(state, hidden):
        loss = lambda s, h: cross_entropy(nnx.merge(graph, s), h, batch, parallel=parallel, chunk=chunk).loss  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(state, hidden)

    hidden = states(1, length, 8)
    largest = max(math.prod(aval.shape) for aval in avals(jax.make_jaxpr(step)(state, hidden).jaxpr))
    assert largest == config.width * config.vocab_size  # a head
    assert largest < length // parallel.ring_size * config.vision_vocab_size // parallel.size("tp")
    compiled = jax.jit(step).lower(state, hidden).compile().memory_analysis()
    assert compiled.temp_size_in_bytes < 4 * length // parallel.ring_size * config.vocab_size // parallel.size("tp")


def test_a_head_without_tokens_is_not_computed():
    """Its matrix is NaN here: anything computed with it would be."""
    model, hidden, batch = cases.model(), states(), cases.batch(rows=8)
    model.vision_head.kernel[...] = jnp.full_like(model.vision_head.kernel[...], jnp.nan)
    text_only = dict(batch, loss_weights=np.where(batch["target_modality"], 0, batch["loss_weights"]))
    loss, dhidden, gradient = ours(model, hidden, text_only, Parallel(), 8)
    assert np.isfinite(loss) and np.isfinite(dhidden).all()
    assert (np.asarray(gradient.vision_head.kernel[...]) == 0).all()
    assert np.isnan(ours(model, hidden, batch, Parallel(), 8)[0])


def test_a_head_computes_only_the_chunks_that_hold_its_tokens():
    head_of = np.asarray([[1, 0, 2, 0, 0, 1, 2, 0, 0, 2, 1, 0]])  # 6 text, 3 vision, 3 without loss
    tokens = _Tokens.of(jnp.zeros((1, 12, 4)), jnp.zeros((1, 12), int), jnp.asarray(head_of), 2, 4)
    assert [tuple(int(i) for i in tokens.chunks(head)) for head in (0, 1)] == [(0, 2), (1, 3)]
    assert tokens.rows(0, 0).tolist() == [1, 3, 4, 7]
    assert tokens.rows(1, 0).tolist() == [8, 11, 12, 12]  # the rest of the chunk is vision
    assert tokens.rows(1, 1).tolist() == [12, 12, 0, 5]
    assert tokens.rows(2, 1).tolist() == [10, 12, 12, 12]
    none = _Tokens.of(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), int), jnp.full((1, 3), 2), 2, 4)
    assert all(first == stop for first, stop in (none.chunks(head) for head in (0, 1)))


def test_sums_are_by_modality_and_add():
    model, hidden, batch = cases.model(), states(), cases.batch(rows=8)
    whole = cross_entropy(model, hidden, batch, parallel=Parallel())
    halves = [
        cross_entropy(model, hidden[half], {k: x[half] for k, x in batch.items()}, parallel=Parallel())
        for half in (slice(0, 4), slice(4, 8))
    ]
    np.testing.assert_allclose(halves[0].plus(halves[1]), whole, rtol=1e-6)
    nll = oracle.nll(oracle.parameters(model), SMALL, hidden.astype(np.float64), batch)
    weights, vision = batch["loss_weights"], batch["target_modality"]
    assert float(whole.vision_loss) == pytest.approx(np.average(nll[vision], weights=weights[vision]), rel=1e-5)
    assert float(whole.text_loss) == pytest.approx(np.average(nll[~vision], weights=weights[~vision]), rel=1e-5)
    assert float(whole.weight) == pytest.approx(weights.sum(), rel=1e-6)


def test_nothing_with_weight_gives_zero_and_no_nan():
    model, hidden, batch = cases.model(), states(), cases.batch(rows=8)
    loss, dhidden, gradient = ours(model, hidden, dict(batch, loss_weights=batch["loss_weights"] * 0), Parallel(), 8)
    assert loss == 0 and (np.asarray(dhidden) == 0).all()
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradient))
    assert float(LossSums(*[jnp.zeros(())] * 4).vision_loss) == 0


def test_bfloat16_states_give_a_float32_loss():
    model, batch = cases.model(changed(dtype="bfloat16")), cases.batch(rows=8)
    hidden = jnp.asarray(states(), jnp.bfloat16)
    params = oracle.parameters(model)
    for name in ("lm_head/kernel", "vision_head/kernel"):  # the product is of bfloat16 numbers, exact from there on
        params[name] = np.asarray(jnp.asarray(params[name], jnp.bfloat16), np.float64)
    expected, _, dkernels = plain(params, SMALL, np.asarray(hidden, np.float64), batch)
    loss, dhidden, gradient = ours(model, hidden, batch, Parallel(), 7)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert dhidden.dtype == jnp.bfloat16 and gradient.lm_head.kernel[...].dtype == jnp.float32
    error = np.linalg.norm(np.asarray(gradient.lm_head.kernel[...]) - dkernels["wte"]) / np.linalg.norm(dkernels["wte"])
    assert error < 2**-8


def test_very_large_logits_are_finite():
    parallel = Parallel(cases.mesh(1, 1, 2, 1))
    model, batch = cases.model(SMALL, parallel), cases.batch(rows=8)
    loss, dhidden, _ = ours(model, states() * 1e4, batch, parallel, 7)
    assert np.isfinite(loss) and np.isfinite(dhidden).all()


def test_text_only_model_reads_every_target_as_text():
    config = changed(vision_vocab_size=0)
    model, hidden, batch = cases.model(config), states(), cases.batch(config, rows=8)
    sums = cross_entropy(model, hidden, batch, parallel=Parallel())
    assert float(sums.vision_weight) == 0
    nll = oracle.nll(oracle.parameters(model), config, hidden.astype(np.float64), batch)
    assert float(sums.loss) == pytest.approx(np.average(nll, weights=batch["loss_weights"]), rel=1e-5)


def test_an_impossible_target_is_nan_only_where_it_counts():
    model, hidden, batch = cases.model(), states(), cases.batch(rows=8)
    heads = model.head_kernel("text"), model.head_kernel("vision")
    targets, vision = batch["targets"].copy(), batch["target_modality"]
    targets[3, 4] = 16 if vision[3, 4] else 40
    active = np.ones_like(vision)
    nll = token_nll(heads, hidden, targets, vision, active, parallel=Parallel(), chunk=9)
    assert np.isnan(nll[3, 4]) and np.isnan(nll).sum() == 1
    active[3, 4] = False
    assert np.isfinite(token_nll(heads, hidden, targets, vision, active, parallel=Parallel(), chunk=9)).all()


def test_refuses_an_empty_chunk():
    with pytest.raises(ValueError, match="chunk 0 must be at least 1"):
        cross_entropy(cases.model(), states(), cases.batch(rows=8), parallel=Parallel(), chunk=0)
