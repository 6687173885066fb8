"""The step: exact over micro-batches and meshes, sharded as the table says."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ringjax.attention import layouts
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.training.config import OptimizerConfig
from ringjax.training.distributed import place_batch, row_group
from ringjax.training.mesh import make_mesh
from ringjax.training.step import make_trainer

MODEL = ModelConfig(
    width=32, ffn_width=48, layers=1, heads=4, kv_heads=2, vocab_size=64, vision_vocab_size=34, vision_codes=32,
    dtype="float32", loss_chunk=32,
)  # fmt: skip
ROWS, LENGTH = 8, 32


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    modality, target_modality = rng.random((2, *shape)) < 0.4
    positions = np.tile(np.arange(LENGTH, dtype=np.int32) % 20, (ROWS, 1))
    return {
        "tokens": rng.integers(0, 32, shape, dtype=np.int32),
        "modality": modality,
        "targets": rng.integers(0, 32, shape, dtype=np.int32),
        "target_modality": target_modality,
        # Rows weigh very differently, so that a mean of means would be far off.
        "loss_weights": (rng.random(shape) * 10.0 ** -np.arange(ROWS)[:, None]).astype(np.float32),
        "positions": positions,
        "behind": positions,
        "ahead": np.zeros(shape, np.int32),
    }


def two_steps(shape, layout="striped", accumulation=1, model=MODEL, seed=0):
    """Metrics of two steps: the second one sees the gradients of the first."""
    mesh = make_mesh(shape)
    parallel = Parallel(mesh, layout)
    trainer = make_trainer(model, OptimizerConfig(learning_rate=1e-2), parallel, steps=10, start=0, seed=seed)
    state, found = trainer.init(0), []
    for seed in range(2):
        order = layouts.get(layout)
        rows = {k: np.asarray(order.permute(v, mesh.shape["sp"], axis=1)) for k, v in make_batch(seed).items()}
        group = row_group(mesh, ROWS // accumulation)
        state, metrics = trainer.step(state, place_batch(rows, mesh, accumulation, group))
        found.append({name: float(value) for name, value in metrics.items()})
    return found, state


@pytest.fixture(scope="module")
def plain():
    return two_steps("8,1,1,1")


def assert_same(found, expected, rtol=1e-5):
    for a, b in zip(found, expected):
        assert a == pytest.approx(b, rel=rtol)


@pytest.mark.parametrize("shape, layout", [("2,1,1,4", "striped"), ("1,2,2,2", "zigzag")])
def test_the_step_does_not_depend_on_the_mesh(plain, shape, layout):
    assert_same(two_steps(shape, layout)[0], plain[0])


def test_accumulation_is_exact(plain):
    assert_same(two_steps("1,1,1,8", accumulation=4)[0], plain[0])


def test_loss_is_by_modality(plain):
    first = plain[0][0]
    batch = make_batch(0)
    text = batch["loss_weights"][~batch["target_modality"]].sum()
    vision = batch["loss_weights"][batch["target_modality"]].sum()
    mean = (first["text_loss"] * text + first["vision_loss"] * vision) / (text + vision)
    assert first["loss"] == pytest.approx(mean, rel=1e-5)
    assert first["text_loss"] == pytest.approx(np.log(64), abs=0.2)
    assert first["vision_loss"] == pytest.approx(np.log(34), abs=0.2)


def test_moments_lie_like_their_parameters():
    mesh = make_mesh("1,2,2,2")
    trainer = make_trainer(MODEL, OptimizerConfig(learning_rate=1e-2), Parallel(mesh, "zigzag"), steps=10, start=0)
    state = trainer.init(0)
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    assert PartitionSpec(None, ("fsdp", "sp"), "tp") in specs  # the blocks' kernels
    adam = state.optimizer[1]
    for moments in (adam.mu, adam.nu):
        for p, m in zip(jax.tree.leaves(state.params), jax.tree.leaves(moments)):
            assert p.sharding.is_equivalent_to(m.sharding, p.ndim)
    assert state.step.sharding.is_fully_replicated


def test_a_batch_is_placed_as_it_was_read():
    mesh = make_mesh("2,1,1,4")
    rows = {"tokens": np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH)}
    assert row_group(mesh, 4) == (0, 1)
    placed = place_batch(rows, mesh, 2, (0, 1))["tokens"]
    assert placed.shape == (2, 4, LENGTH)
    assert placed.sharding.spec == PartitionSpec(None, ("dp", "fsdp"), "sp")
    np.testing.assert_array_equal(np.asarray(placed).reshape(ROWS, LENGTH), rows["tokens"])


def test_evaluation_sees_everything_where_training_sees_groups():
    mesh = make_mesh("1,1,1,8")
    losses = {}
    for group in (None, 4):
        model = dataclasses.replace(MODEL, shifted_group=group)
        trainer = make_trainer(model, OptimizerConfig(), Parallel(mesh), steps=10, start=0, donate=False)
        state = trainer.init(0)
        rows = {k: np.asarray(layouts.get("striped").permute(v, 8, axis=1)) for k, v in make_batch().items()}
        batch = place_batch(rows, mesh, 1, row_group(mesh, ROWS))
        evaluated = jax.tree.map(np.sum, jax.device_get(trainer.evaluate(state.whole, batch)))
        losses[group] = float(trainer.step(state, batch)[1]["loss"]), float(evaluated.loss)
    assert losses[4][1] == pytest.approx(losses[None][1], rel=1e-5)
    assert abs(losses[4][0] - losses[None][0]) > 1e-5


DROPPED = dataclasses.replace(MODEL, dropout=0.25, layers=2)


def test_dropout_does_not_depend_on_the_mesh_the_layout_or_the_micro_batches():
    plain, _ = two_steps("8,1,1,1", model=DROPPED)
    assert plain[0]["loss"] != pytest.approx(two_steps("8,1,1,1", model=DROPPED, seed=1)[0][0]["loss"], rel=1e-4)
    assert_same(two_steps("1,2,2,2", "zigzag", model=DROPPED)[0], plain)
    assert_same(two_steps("1,1,1,8", accumulation=4, model=DROPPED)[0], plain)


def test_dropout_is_for_training_alone():
    for remat in ("none", "full"):
        parallel = Parallel(make_mesh("2,1,1,4"))
        model = dataclasses.replace(DROPPED, remat=remat)
        trainer = make_trainer(model, OptimizerConfig(), parallel, steps=10, start=0, donate=False)
        state = trainer.init(0)
        batch = place_batch(make_batch(), parallel.mesh, 1, row_group(parallel.mesh, ROWS))
        _, trained = trainer.step(state, batch)
        evaluated = trainer.evaluate(state.whole, batch).loss[0]
        without = dataclasses.replace(model, dropout=0.0)
        plain = make_trainer(without, OptimizerConfig(), parallel, steps=10, start=0, donate=False)
        assert float(evaluated) == pytest.approx(float(plain.step(state, batch)[1]["loss"]), rel=1e-6)
        assert float(evaluated) != pytest.approx(float(trained["loss"]), rel=1e-4)


def test_every_step_drops_something_else():
    parallel = Parallel(make_mesh("8,1,1,1"))
    # Nothing is learned, so that only what is dropped tells the two steps apart.
    trainer = make_trainer(DROPPED, OptimizerConfig(learning_rate=1e-30, min_learning_rate=0, weight_decay=0), parallel,
                           steps=10, start=0, donate=False)  # fmt: skip
    batch = place_batch(make_batch(), parallel.mesh, 1, row_group(parallel.mesh, ROWS))
    first = trainer.init(0)
    second, one = trainer.step(first, batch)
    _, other = trainer.step(second, batch)
    _, again = trainer.step(first, batch)
    assert float(one["loss"]) == float(again["loss"])
    assert float(one["loss"]) != pytest.approx(float(other["loss"]), rel=1e-4)
