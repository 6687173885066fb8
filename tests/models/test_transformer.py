import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringjax.attention import Reach
from ringjax.models import Parallel, Transformer
from ringjax.models.transformer import with_config
from ringjax.training.loss import cross_entropy
from tests.models import cases, oracle
from tests.models.cases import SMALL, changed
from tests.models.hlo import collectives

VARIANTS = {
    "lwm": changed(kv_heads=None, qkv_bias=False),
    "gqa, biases": SMALL,
    "mqa, head_dim, window, softcap": changed(kv_heads=1, head_dim=10, window=5, softcap=3.0),
    "tied": changed(tie_embeddings=True),
    "text only": changed(vision_vocab_size=0),
}


def hidden_and_loss(model, batch):
    states = cases.hidden(model, batch)
    return states, cross_entropy(model, states, batch, parallel=Parallel()).loss


@pytest.mark.parametrize("name", VARIANTS)
def test_is_the_plain_formula(name):
    config = VARIANTS[name]
    model, batch = cases.model(config), cases.batch(config)
    states, loss = jax.jit(hidden_and_loss)(model, batch)
    params = oracle.parameters(model)
    expected = oracle.hidden(params, config, batch)
    np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert float(loss) == pytest.approx(oracle.loss(params, config, batch), rel=1e-5)


def loss_of(graph, parallel):
    def loss(state, batch):
        model = nnx.merge(graph, state)
        return cross_entropy(model, cases.hidden(model, batch, parallel), batch, parallel=parallel).loss

    return loss


def loss_and_gradient(config, parallel, batch):
    """Loss, gradient as {path: array}."""
    graph, state = nnx.split(cases.model(config, parallel))
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(graph, parallel)))(state, cases.in_layout(batch, parallel))
    return float(loss), {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradient)}


def test_gradient_is_that_of_the_plain_formula():
    """Along a random direction, against central differences of the float64 formula."""
    batch = cases.batch()
    graph, state = nnx.split(cases.model(SMALL))
    gradient = jax.jit(jax.grad(loss_of(graph, Parallel())))(state, batch)
    params = oracle.parameters(nnx.merge(graph, state))
    slopes = oracle.parameters(nnx.merge(graph, gradient))
    rng = np.random.default_rng(1)
    for name in params:  # each parameter on its own, so that none hides behind another
        direction = rng.standard_normal(params[name].shape)
        step = 1e-4 * direction / np.linalg.norm(direction)
        up, down = (oracle.loss(params | {name: params[name] + sign * step}, SMALL, batch) for sign in (1, -1))
        slope = np.sum(slopes[name] * step)
        scale = 1e-4 * np.linalg.norm(slopes[name])
        assert abs((up - down) / 2 - slope) <= 1e-4 * scale + 1e-13, name


@pytest.fixture(scope="module")
def one_device():
    return loss_and_gradient(SMALL, Parallel(), cases.batch(rows=8))


@pytest.mark.parametrize(
    "shape, layout, strategy",
    [
        ((2, 4, 1, 1), "striped", "ring"),
        ((1, 2, 2, 2), "striped", "ring"),
        pytest.param((1, 1, 4, 2), "contiguous", "ring", marks=pytest.mark.slow),
        ((2, 1, 1, 4), "zigzag", "ring"),
        pytest.param((1, 1, 1, 8), "striped", "ring", marks=pytest.mark.slow),
        ((1, 4, 1, 2), "striped", "ulysses"),
        pytest.param((1, 1, 2, 4), "zigzag", "all_gather", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_do_not_depend_on_the_mesh(one_device, shape, layout, strategy):
    parallel = Parallel(cases.mesh(*shape), layout, strategy)
    loss, gradient = loss_and_gradient(SMALL, parallel, cases.batch(rows=8))
    assert loss == pytest.approx(one_device[0], rel=1e-5)
    for path, expected in one_device[1].items():
        error = np.linalg.norm(gradient[path] - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, path


def test_parameters_do_not_depend_on_the_mesh():
    here = nnx.state(Transformer.create(SMALL, 3))
    there = nnx.state(Transformer.create(SMALL, 3, Parallel(cases.mesh(1, 2, 2, 2))))
    jax.tree.map(np.testing.assert_array_equal, here, there)
    assert there.lm_head.kernel[...].sharding.spec == jax.sharding.PartitionSpec(("fsdp", "sp"), "tp")


def test_bfloat16_stays_close_and_keeps_float32_parameters():
    model, batch = cases.model(changed(dtype="bfloat16")), cases.batch()
    states = jax.jit(cases.hidden)(model, batch)
    expected = oracle.hidden(oracle.parameters(model), SMALL, batch)
    assert states.dtype == jnp.bfloat16 and model.lm_head.kernel[...].dtype == jnp.float32
    assert np.linalg.norm(np.asarray(states, np.float64) - expected) / np.linalg.norm(expected) < 0.03


@pytest.mark.parametrize("ffn_chunk", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_nothing_as_long_as_the_sequence_is_gathered(ffn_chunk):
    """Every collective of a training step carries a parameter or one device's keys and values, no more."""
    length, config = 1024, changed(ffn_chunk=ffn_chunk, qkv_bias=False)
    parallel = Parallel(cases.mesh(1, 1, 2, 4))
    graph, state = nnx.split(cases.model(config, parallel))
    batch = cases.in_layout(cases.batch(config, rows=2, length=length), parallel)
    batch = jax.device_put(batch, parallel.sharding("batch", "sequence"))
    text = jax.jit(jax.grad(loss_of(graph, parallel))).lower(state, batch).compile().as_text()
    sizes = collectives(text)
    stream = 2 * length // 4 * config.width  # what a device holds of the stream: sums over tp carry it
    hop = 2 * (2 * length // 4) * (config.key_heads // 2) * config.head_size  # K and V of one shard
    assert max(sizes["collective-permute"]) <= hop
    assert max(sizes["all-reduce"]) <= stream
    assert max(sizes["all-gather"]) <= config.width * max(config.ffn_width, config.vocab_size)
    assert "all-to-all" not in sizes


def test_temporary_memory_is_linear_in_the_sequence():
    graph, state = nnx.split(Transformer.abstract(changed(remat="save_attention", ffn_chunk=16)))
    parallel = Parallel(cases.mesh(1, 1, 1, 4))
    place = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)  # noqa: E731
    state = jax.tree.map(place, state, parallel.param_shardings(state))

    def temporary(length):
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.sharding("batch", "sequence"))
            for name, x in cases.batch(rows=1, length=length).items()
        }
        compiled = jax.jit(jax.grad(loss_of(graph, parallel))).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(16384) / temporary(8192) <= 2.1


@pytest.mark.parametrize("config", [SMALL, changed(vision_vocab_size=0)], ids=["any-to-any", "text only"])
def test_ids_outside_the_tables_become_nan(config):
    model, batch = cases.model(config), cases.batch(config)
    batch["tokens"][2, 5] = 16 if config.vision_vocab_size else 40
    batch["modality"][2, 5] = bool(config.vision_vocab_size)
    states = np.asarray(cases.hidden(model, batch))
    assert np.isnan(states[2, 5]).all() and np.isfinite(states[[0, 1, 3]]).all()


def test_refuses_inputs_of_the_wrong_kind():
    model, batch = cases.model(), cases.batch()
    with pytest.raises(ValueError, match=r"modality is int32\[4, 32\]; it must be bool"):
        model.hidden(batch["tokens"], batch["tokens"], batch["positions"])
    with pytest.raises(ValueError, match=r"positions is int32\[4, 31\]; it must be integer \[B, T\] = \[4, 32\]"):
        model.hidden(batch["tokens"], batch["modality"], batch["positions"][:, 1:])
    with pytest.raises(ValueError, match="no vision head: its config has vision_vocab_size 0"):
        Transformer.abstract(changed(vision_vocab_size=0)).vision_logits(jnp.zeros((1, 32)))


def test_with_config_keeps_the_parameters():
    model, batch = cases.model(), cases.batch()
    far = with_config(model, rope_theta=5e7, remat="full")
    assert far.config.rope_theta == 5e7 and far.h.attention.config.rope_theta == 5e7
    near = cases.hidden(model, batch)
    assert np.abs(cases.hidden(far, batch) - near).max() > 1e-3
    back = with_config(far, rope_theta=SMALL.rope_theta)
    np.testing.assert_array_equal(cases.hidden(back, batch), near)


def test_a_stack_of_layers_compiles_once():
    def size(layers):
        graph, state = nnx.split(Transformer.abstract(changed(layers=layers)))
        batch = cases.batch()
        return len(jax.jit(lambda s: cases.hidden(nnx.merge(graph, s), batch)).lower(state).as_text())

    assert size(12) < 1.05 * size(2)


def test_causal_without_a_reach():
    model, batch = cases.model(), cases.batch()
    inputs = batch["tokens"], batch["modality"], np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32))
    np.testing.assert_allclose(model.hidden(*inputs), model.hidden(*inputs, Reach.causal(4, 32)), rtol=1e-6)
