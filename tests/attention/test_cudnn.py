"""cuDNN needs a GPU; what can be tested without one: the private interface it relies on, and what it refuses."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as fused

import ringjax as rj
from ringjax.attention import kernels, validate
from ringjax.attention.kernels import cudnn
from tests.attention import cases

SHAPE = jax.ShapeDtypeStruct((1, 256, 8, 128), jnp.bfloat16)
KEYS = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)


def test_private_signatures():
    """The operands and options that `cudnn.py` binds, in the JAX that is installed (0.10 to 0.12 were read)."""
    shared = ["query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"]
    tables = ["page_table_k", "page_table_v"]
    options = {"scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"}
    newer = {"score_mod"} if jax.__version_info__ >= (0, 12) else set()
    for function, own, extra in (
        (fused._dot_product_attention_fwd_impl, [], {"is_training"}),
        (fused._dot_product_attention_bwd_impl, ["activation", "fwd_output", "grad_output"], set()),
    ):
        names = list(inspect.signature(function).parameters)
        assert names[: len(shared + tables + own)] == shared + tables + own
        rest = set(names[len(shared + tables + own) :]) - {"score_mod_args"}
        assert rest == options | extra | newer, function


@pytest.mark.parametrize("causal", [True, False])
def test_the_calls_are_lowered_for_cuda(causal):
    """Both passes bind and lower for a GPU on a machine that has none; lse is float32, gradients are bfloat16."""
    score = validate.score(None, None, 128)
    out, lse = jax.eval_shape(lambda q, k, v: cudnn.forward(q, k, v, causal, score), SHAPE, KEYS, KEYS)
    assert out.dtype == jnp.bfloat16 and out.shape == SHAPE.shape
    assert lse.dtype == jnp.float32 and lse.shape == (1, 8, 256)

    def both(q, k, v, dout):
        out, lse = cudnn.forward(q, k, v, causal, score)
        return cudnn.backward(q, k, v, out, lse, dout, None, causal, score)

    lowered = jax.jit(both).trace(SHAPE, KEYS, KEYS, SHAPE).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in lowered and "__cudnn$fmhaSoftmaxBackward" in lowered
    assert ('mask_type\\22: \\22CAUSAL' in lowered) == causal


def test_what_it_refuses():
    score = validate.score(None, None, 128)
    assert cudnn.refuses(SHAPE, KEYS, KEYS, score) is None
    wide = jax.ShapeDtypeStruct((1, 256, 8, 512), jnp.bfloat16)
    single = jax.ShapeDtypeStruct((1, 256, 8, 128), jnp.float32)
    assert "float32 is neither" in cudnn.refuses(single, single, single, score)
    assert "head size 512" in cudnn.refuses(wide, wide, wide, score)
    assert "differ" in cudnn.refuses(SHAPE, KEYS, wide, score)
    assert "softcap 3.0" in cudnn.refuses(SHAPE, KEYS, KEYS, validate.score(None, 3.0, 128))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="says what a machine without a GPU answers")
def test_a_machine_without_a_gpu_says_so():
    q = jnp.zeros((1, 16, 1, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="backend 'cudnn' .* needs an NVIDIA GPU, not a cpu"):
        rj.attention(q, q, q, backend="cudnn")


def test_no_empty_array_is_carried_out_of_a_loop(monkeypatch):
    """The compiler crashes on an empty argument of a shard_map, which is where constants of a scan's body end up."""
    monkeypatch.setitem(kernels.KERNELS, "cudnn", dataclasses.replace(cudnn.KERNEL, unavailable=lambda: None))
    mesh = cases.mesh(2)

    def loss(q, k, v, behind):
        reach = rj.Reach(behind, 0 * behind)
        layer = lambda x, _: (rj.sharded_attention(x, k, v, mesh=mesh, reach=reach), None)  # noqa: E731
        return lax.scan(layer, q, length=2)[0].astype(jnp.float32).sum()

    behind = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).trace(SHAPE, KEYS, KEYS, behind).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in lowered
    assert not re.search(r"%arg\d+: tensor<0x", lowered)
