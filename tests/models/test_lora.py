"""Adapters: the formula, merging, what is trained, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringjax.models import Parallel, lora
from ringjax.models.lora import LoraConfig
from ringjax.training.loss import cross_entropy
from tests.models import cases
from tests.models.cases import SMALL, changed

EVERYTHING = LoraConfig(rank=3, alpha=5, targets=("w?", "lm_head", "vision_head"))


def adapted(config=SMALL, made=EVERYTHING, model=None, seed=0):
    """A model whose adapters change something."""
    model = lora.with_adapters(model or cases.model(config), made, nnx.Rngs(params=seed))
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        if getattr(module, "low_rank", None) is not None:
            b = module.low_rank.b
            b[...] = jnp.asarray(0.2 * rng.standard_normal(b[...].shape), jnp.float32)
    return model


def by_hand(model, made):
    """The same model with `W + s · A · B` in place of its kernels, in float64 by NumPy."""
    plain = cases.model(model.config)
    scale = made.alpha / (np.sqrt(made.rank) if made.rank_stabilised else made.rank)
    modules = dict(nnx.iter_modules(plain))
    for path, module in nnx.iter_modules(model):
        if getattr(module, "low_rank", None) is not None:
            a, b = (np.asarray(x[...], np.float64) for x in (module.low_rank.a, module.low_rank.b))
            modules[path].kernel[...] = jnp.asarray(np.asarray(module.kernel[...]) + scale * (a @ b), jnp.float32)
    return plain


def loss(model, batch, parallel=None):
    parallel = parallel or Parallel()
    return cross_entropy(model, cases.hidden(model, batch, parallel), batch, parallel=parallel).loss


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("ffn_chunk", [None, 5])
def test_the_formula(ffn_chunk, stabilised):
    """All layers, heads, and the blockwise feed-forward too."""
    made = LoraConfig(3, 5, EVERYTHING.targets, rank_stabilised=stabilised)
    model, batch = adapted(changed(ffn_chunk=ffn_chunk), made), cases.batch()
    wanted = by_hand(model, made)
    np.testing.assert_allclose(cases.hidden(model, batch), cases.hidden(wanted, batch), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss(model, batch), loss(wanted, batch), rtol=1e-5)
    assert abs(loss(model, batch) - loss(cases.model(), batch)) > 1e-3


def test_new_adapters_change_nothing():
    model = lora.with_adapters(cases.model(), EVERYTHING, nnx.Rngs(0))
    np.testing.assert_array_equal(cases.hidden(model, cases.batch()), cases.hidden(cases.model(), cases.batch()))


def test_merging_there_and_back():
    model, batch = adapted(), cases.batch()
    before = jax.tree.map(np.asarray, nnx.state(model))
    plain = lora.merged(model)
    assert nnx.graphdef(plain) == nnx.graphdef(cases.model())
    np.testing.assert_allclose(cases.hidden(plain, batch), cases.hidden(model, batch), rtol=1e-4, atol=1e-5)
    # The model with adapters is what it was, bit for bit: that way back is exact.
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))
    back = nnx.state(lora.unmerged(plain, model))
    for (path, a), (_, b) in zip(nnx.to_flat_state(back), nnx.to_flat_state(nnx.state(cases.model())), strict=True):
        np.testing.assert_allclose(a.get_value(), b.get_value(), atol=2e-7, err_msg=str(path))


def test_of_a_model_in_bfloat16_the_way_back_is_exact():
    """Merged in float32: what is lost in rounding is less than half of bfloat16's last bit."""
    base = cases.model()
    graph, state = nnx.split(base)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    model = adapted(model=nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), narrow)))
    back = nnx.state(lora.unmerged(lora.merged(model), model))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), back, narrow)


@pytest.mark.parametrize("also", [(), ("norms",), ("norms", "embeddings")])
def test_what_is_trained(also):
    made = LoraConfig(2, targets=("wq",), also=also)
    state = nnx.state(adapted(made=made))
    trained, frozen = lora.split_trained(state, made)
    names = {".".join(path) for path, _ in nnx.to_flat_state(trained)}
    wanted = {"h.attention.wq.low_rank.a", "h.attention.wq.low_rank.b"}
    wanted |= {"h.attention_norm.kernel", "h.ffn_norm.kernel", "ln_f.kernel"} if "norms" in also else set()
    wanted |= {"wte.embedding", "vte.embedding"} if "embeddings" in also else set()
    assert names == wanted
    own = sum(leaf.size for path, leaf in nnx.to_flat_state(trained) if "low_rank" not in path)
    assert lora.also_count(cases.model().config, made) == own
    jax.tree.map(np.testing.assert_array_equal, lora.joined(trained, frozen), state)


def test_gradients_do_not_depend_on_the_mesh():
    """dp, fsdp, tp and the ring; adapters on inputs and on outputs that are cut."""
    made, batch = EVERYTHING, cases.batch()
    found = {}
    for shape in ((1, 1, 1, 1), (1, 2, 2, 2), (2, 1, 1, 4)):
        parallel = Parallel(cases.mesh(*shape))
        model = adapted(model=cases.model(SMALL, parallel))
        graph, state = nnx.split(model)
        trained, frozen = lora.split_trained(state, made)
        rows = cases.in_layout(batch, parallel)

        def value(trained, frozen, rows, parallel=parallel, graph=graph):
            return loss(nnx.merge(graph, lora.joined(trained, frozen)), rows, parallel)

        found[shape] = jax.jit(jax.value_and_grad(value))(trained, frozen, rows)
    (want, grads), *others = found.values()
    flat = dict(nnx.to_flat_state(grads))
    assert all(np.abs(np.asarray(leaf.get_value())).max() > 0 for leaf in flat.values())
    for value, other in others:
        np.testing.assert_allclose(value, want, rtol=1e-5)
        for path, leaf in nnx.to_flat_state(other):
            wanted = np.asarray(flat[path].get_value())
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(leaf.get_value(), wanted, atol=2e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 0}, "rank 0 must be a whole number"),
        ({"alpha": 0.0}, "alpha 0.0 must be"),
        ({"targets": ()}, "targets is empty"),
        ({"dropout": 0.1}, "lora.dropout 0.1 .* is not here"),
        ({"also": ("heads",)}, "also 'heads' is not one of norms, embeddings"),
    ],
)
def test_refused_configs(options, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**options)


def test_a_target_that_is_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"'q_proj' is no linear layer.*h.attention.wk, h.attention.wo"):
        lora.abstract(SMALL, LoraConfig(targets=("wq", "q_proj")))
