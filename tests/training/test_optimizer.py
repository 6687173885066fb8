"""AdamW against its formula, and the learning rate over the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.models.sizes import SIZES
from ringjax.models.transformer import Transformer
from ringjax.training.config import OptimizerConfig
from ringjax.training.optimizer import decays, learning_rate, make_optimizer


def rates(config, steps):
    return [float(learning_rate(config, step, steps)) for step in range(steps)]


def test_cosine_with_warm_up():
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    found = rates(config, 104)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4] == pytest.approx(1.0)
    assert found[54] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(found[4:], found[5:]))


def test_constant_rate():
    assert rates(OptimizerConfig(learning_rate=2.0, schedule="constant"), 5) == [2.0] * 5


def test_norms_and_biases_do_not_decay():
    from flax import nnx

    config = SIZES["debug"].__class__(width=16, ffn_width=16, layers=1, heads=2, qkv_bias=True)
    state = nnx.state(Transformer.abstract(config))
    decayed = jax.tree_util.tree_map_with_path(decays, state)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(decayed)[0]
    }
    kept = {name for name, value in leaves.items() if not value}
    assert len(kept) == 6 and all(any(word in name for word in ("norm", "ln_f", "bias")) for name in kept), leaves
    assert any("wte" in name for name, value in leaves.items() if value)


def test_adamw_follows_its_formula():
    config = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.array([1.0, -2.0]), "norm": jnp.array([3.0])}
    state = optimizer.init(params)
    m, v = np.zeros(3), np.zeros(3)
    for t, raw in enumerate(([3.0, 4.0, 0.0], [0.1, -0.2, 0.3]), start=1):
        grads = {"kernel": jnp.array(raw[:2]), "norm": jnp.array(raw[2:])}
        direction, state = optimizer.update(grads, state, params)
        g = np.array(raw) * min(1.0, 1.0 / np.linalg.norm(raw))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        expected = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * np.array([1.0, -2.0, 0.0])
        found = np.concatenate([direction["kernel"], direction["norm"]])
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_tables_of_pictures_may_learn_faster():
    from flax import nnx

    small = SIZES["debug"].__class__(width=16, ffn_width=16, layers=1, heads=2, vocab_size=32, vision_codes=8,
                                     vision_vocab_size=10, dtype="float32")  # fmt: skip
    params = nnx.state(Transformer.create(small, 0))
    grads = jax.tree.map(jnp.ones_like, params)
    found = []
    for rate in (1.0, 5.0):
        optimizer = make_optimizer(OptimizerConfig(vision_rate=rate))
        found.append(optimizer.update(grads, optimizer.init(params), params)[0])
    ratios = jax.tree_util.tree_map(lambda a, b: float(jnp.max(jnp.abs(b / a))), *found)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="."): ratio
        for path, ratio in jax.tree_util.tree_flatten_with_path(ratios)[0]
    }
    fast = {name for name, ratio in names.items() if ratio == pytest.approx(5)}
    assert {name.split(".")[0] for name in fast} == {"vte", "vision_head"}
    assert all(ratio == pytest.approx(1) for name, ratio in names.items() if name not in fast)
    with pytest.raises(ValueError, match="vision_rate is 0"):
        OptimizerConfig(vision_rate=0)
