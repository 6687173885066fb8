"""One step of the image tokenizer: what moves, when, and that it does not matter where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.training.checkpoint import flatten_named
from ringjax.training.image_tokenizer.feed import place_pictures
from ringjax.training.image_tokenizer.step import CodeUse, _Parts, compile_trainer
from ringjax.training.mesh import make_mesh
from tests.data.picture_folder import drawn
from tests.training.image_tokenizer.tiny import FSQ, dotted, tiny


def batches(count: int, size: int = 8):
    pictures = np.stack([np.asarray(drawn(i, 16)) for i in range(count * size)])
    return pictures.reshape(count, size, 16, 16, 3)


@functools.cache
def trained(devices: int, steps: int, **overrides):
    """States (as numpy) and metrics of the first steps."""
    (stage,) = tiny(**overrides).stage_list
    mesh = make_mesh(f"{devices},1,1,1", jax.devices()[:devices])
    trainer = compile_trainer(stage, mesh, 5, 0)
    state, states, metrics = trainer.init(0), [], []
    for pictures in batches(steps):
        states.append(jax.tree.map(np.asarray, state))
        state, found = trainer.step(state, place_pictures(pictures, mesh, (0, 1)), None)
        metrics.append({name: float(value) for name, value in found.items()})
    return [*states, jax.tree.map(np.asarray, state)], metrics


def test_a_step_does_not_depend_on_the_mesh():
    (one, measured), (eight, other) = trained(1, 6), trained(8, 6)
    for a, b in zip(measured, other):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
    for name, value in flatten_named(one[-1].params).items():
        np.testing.assert_allclose(value, flatten_named(eight[-1].params)[name], rtol=2e-3, atol=2e-4, err_msg=name)


def test_the_game_begins_when_it_should():
    states, metrics = trained(8, 6)
    judges = [flatten_named(state.params["discriminator"]) for state in states]
    moved = [any(np.any(a[name] != b[name]) for name in a) for a, b in zip(judges, judges[1:])]
    assert moved == [False] * 4 + [True] * 2
    assert [m["adversarial_weight"] > 0 for m in metrics] == moved
    assert metrics[4]["discriminator_loss"] == pytest.approx(1, abs=0.3)


def test_the_average_follows_the_weights():
    states, _ = trained(8, 6)
    expected = flatten_named(states[0].params["model"])
    for done, state in enumerate(states[1:]):
        decay = min(0.8, (1 + done) / (10 + done))
        weights = flatten_named(state.params["model"])
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
    for name, value in flatten_named(states[-1].params["average"]).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_what_is_random_follows_from_the_step():
    (stage,) = tiny().stage_list
    mesh = make_mesh("8,1,1,1")
    trainer = compile_trainer(stage, mesh, 5, 0)
    pictures = place_pictures(batches(1)[0], mesh, (0, 1))

    def loss(step: int) -> float:
        state = trainer.init(0)
        return float(trainer.step(state._replace(step=state.step + step), pictures, None)[1]["loss"])

    found = [loss(step) for step in (0, 0, 1, 2)]
    assert found[0] == found[1] and len(set(found)) == 3


def test_the_use_of_codes_is_counted():
    (stage,) = tiny(vqgan__codes=4).stage_list
    parts = _Parts(stage, 0, 0)
    use = parts.fresh_optimizer(parts.init(0).params)["use"]
    assert isinstance(use, CodeUse)
    usages, counts = [], np.zeros(4)
    for step, codes in enumerate([[0, 1], [1, 1], [2, 1], [1, 1], [1, 1]]):
        use, metrics = parts.note_use(use, jnp.array(codes), step)
        usages.append(float(metrics["usage"]))
        counts = counts * (1 - 1 / 3) + np.bincount(codes, minlength=4)
    assert usages == [0.5, 0.5, 0.75, 0.5, 0.5]  # over the last 3 steps; the 0 of step 0 counts up to step 2
    share = counts / counts.sum()
    share = share[share > 0]
    assert float(metrics["perplexity"]) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


@pytest.mark.parametrize("method", ["ema", "plain", "fsq"])
def test_every_codebook_learns(method):
    options = dotted(FSQ) if method == "fsq" else {"codebook__method": method}
    states, metrics = trained(8, 25, losses__adversarial=0, optimizer__learning_rate=1e-2, **options)
    losses = [m["reconstruction_loss"] for m in metrics]
    assert np.mean(losses[-3:]) < 0.75 * losses[0]
    assert states[-1].params["discriminator"] == {}
    if method == "fsq":
        assert "codebook" not in states[-1].params["model"] and metrics[-1]["codebook_loss"] == 0
        return
    before, after = (np.asarray(state.params["model"]["codebook"].get_value()) for state in (states[0], states[-1]))
    assert np.any(before != after)
    if method == "ema":
        averages = states[-1].optimizer["codebook"]
        np.testing.assert_allclose(after, averages.sums / averages.counts[:, None], rtol=1e-5)
        assert metrics[-1]["usage"] >= 0.9


def test_bfloat16_keeps_float32_weights():
    options = {"losses__adversarial": 0, "optimizer__learning_rate": 1e-2}
    states, metrics = trained(8, 3, training__dtype="bfloat16", **options)
    assert {leaf.dtype for leaf in jax.tree.leaves(states[-1].params)} == {np.dtype(np.float32)}
    _, exact = trained(8, 25, codebook__method="ema", **options)
    for found, expected in zip(metrics, exact):
        assert found["reconstruction_loss"] == pytest.approx(expected["reconstruction_loss"], rel=0.02)
    assert metrics[0]["reconstruction_loss"] != exact[0]["reconstruction_loss"]
