import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ringjax.models import Parallel, Transformer
from tests.models import cases
from tests.models.cases import SMALL, changed


def test_the_table_puts_axes_on_the_mesh():
    parallel = Parallel(cases.mesh(1, 2, 2, 2))
    assert parallel.spec("batch", "sequence", "heads", None) == P(("dp", "fsdp"), "sp", "tp", None)
    assert parallel.spec("embed", "ffn") == P(("fsdp", "sp"), "tp")
    assert (parallel.ring_size, parallel.size("dp", "fsdp", "tp")) == (2, 4)
    assert hash(parallel) == hash(Parallel(cases.mesh(1, 2, 2, 2)))


def test_axes_that_the_mesh_lacks_are_left_out():
    only_ring = Parallel(Mesh(np.asarray(jax.devices()[:4]), ("sp",), axis_types=(AxisType.Auto,)))
    assert only_ring.spec("batch", "sequence", "vocab") == P(None, "sp", None)
    assert Parallel().spec("batch", "embed") == P(None, None)
    assert Parallel().ring_size == 1


def test_axes_that_do_not_divide_are_left_out():
    parallel = Parallel(cases.mesh(1, 2, 1, 4))
    assert parallel.param_spec((24, 6), ("embed", "ffn")) == P(("fsdp", "sp"), "tp")
    assert parallel.param_spec((6, 6), ("embed", "ffn")) == P("fsdp", "tp")
    assert parallel.param_spec((7, 6), ("embed", "ffn")) == P(None, "tp")
    with pytest.raises(ValueError, match=r"tp 2 does not divide the vocab axis.*\(32, 41\); use a tp that divides 41"):
        Parallel(cases.mesh(1, 1, 2, 1)).param_spec((32, 41), ("embed", "vocab"))


def test_a_model_of_odd_width_trains_on_fsdp():
    """Width 18 over fsdp·sp = 4 is kept whole in part; the loss does not notice."""
    config = changed(width=18, head_dim=6, ffn_width=20, ffn_chunk=5)
    batch, parallel = cases.batch(), Parallel(cases.mesh(1, 2, 1, 2))
    expected = cases.hidden(cases.model(config), batch)
    model = cases.model(config, parallel)
    assert model.h.feed_forward.w1.kernel[...].sharding.spec == P(None, "fsdp", "tp")
    found = jax.jit(lambda b: cases.hidden(model, b, parallel))(cases.in_layout(batch, parallel))
    expected = cases.in_layout({"x": np.asarray(expected)}, parallel)["x"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_optimizer_states_lie_like_their_parameters():
    parallel = Parallel(cases.mesh(1, 2, 2, 2))
    state = nnx.state(Transformer.abstract(SMALL))
    shardings = parallel.param_shardings(jax.eval_shape(optax.adamw(1e-3).init, state))
    assert shardings[0].mu.h.attention.wq.kernel.get_value().spec == P(None, ("fsdp", "sp"), "tp")
    assert shardings[0].count.spec == P()
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(shardings))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layout="stripe"), "unknown layout 'stripe'.*'striped'"),
        (dict(strategy="rings"), "unknown strategy 'rings'"),
        (dict(backend="cudn"), "unknown backend 'cudn'"),
    ],
)
def test_refuses_unknown_names(options, message):
    with pytest.raises(ValueError, match=message):
        Parallel(**options)


def test_refuses_meshes_it_cannot_use():
    devices = np.asarray(jax.devices()[:2])
    with pytest.raises(ValueError, match="mesh axis 'model' has no meaning"):
        Parallel(Mesh(devices, ("model",), axis_types=(AxisType.Auto,)))
    with pytest.raises(ValueError, match="needs Auto axes"):
        Parallel(Mesh(devices, ("sp",), axis_types=(AxisType.Explicit,)))
    with pytest.raises(ValueError, match="has no mesh"):
        Parallel().sharding("batch")
    with pytest.raises(ValueError, match="unknown logical axis 'time'"):
        Parallel().spec("time")


def test_gathering_a_weight_and_reducing_its_gradient_are_inverse():
    """Every device adds 1 + its number to each entry of a gradient; the sum lies where the weight does."""
    parallel = Parallel(cases.mesh(2, 2, 1, 2))
    weight = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    spec = parallel.param_spec(weight.shape, ("embed", "ffn"))

    def local(weight):
        whole = parallel.gather_weight(weight, spec, jnp.float32)
        index = jax.lax.axis_index(("dp", "fsdp", "sp"))
        return parallel.reduce_weight(whole * (1 + index), spec)

    total = jax.jit(parallel.local(local, (spec,), spec))(weight)
    np.testing.assert_array_equal(total, weight * 36)
    assert total.sharding.shard_shape(total.shape) == (2, 3)


def test_a_window_cuts_a_reach():
    batch = cases.batch()
    config = changed(window=3)
    narrow = dict(batch, behind=np.minimum(batch["behind"], 2))
    found, expected = cases.hidden(cases.model(config), batch), cases.hidden(cases.model(SMALL), narrow)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
