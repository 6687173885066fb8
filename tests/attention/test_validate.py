"""Wrong calls are refused in one line that names the value, the rule and the way out."""

import jax
import jax.numpy as jnp
import pytest

import ringjax as rj
from tests.attention import cases


def arrays(heads=4, kv_heads=2, length=8, dtype=jnp.float32):
    shape = jnp.zeros((2, length, heads, 8), dtype), jnp.zeros((2, length, kv_heads, 8), dtype)
    return shape[0], shape[1], shape[1]


@pytest.mark.parametrize("change, message", [
    (lambda q, k, v: (q[0], k, v), r"q has shape \(8, 4, 8\); it must be \[B, T, N, H\]"),
    (lambda q, k, v: (q[:, :, :3], k, v), "2 key/value heads do not divide 3 query heads"),
    (lambda q, k, v: (q, k[..., :4], v), "q has head size 8 and k has 4"),
    (lambda q, k, v: (q, k, v[:, :5]), "must agree in batch, length and heads"),
    (lambda q, k, v: (q[:1], k, v), "q has batch 1 and k has batch 2"),
    (lambda q, k, v: (q.astype(jnp.int32), k, v), "q has type int32"),
    (lambda q, k, v: (q.astype(jnp.bfloat16), k, v), "types bfloat16, float32 and float32; cast them to one"),
    (lambda q, k, v: (q, k[:, :4], v[:, :4]), "8 queries and 4 keys"),
    (lambda q, k, v: (q[:, :0], k, v), "an axis is empty"),
])  # fmt: skip
def test_shapes_and_types(change, message):
    with pytest.raises(ValueError, match=message):
        rj.attention(*change(*arrays()))


@pytest.mark.parametrize("options, message", [
    (dict(backend="cudn"), "unknown backend 'cudn'; the backends are 'auto'"),
    (dict(softcap=-1.0), "softcap -1.0 must be positive"),
    (dict(scale=float("nan")), "scale nan must be a finite"),
    (dict(window=0), "window 0 must be an integer of at least 1"),
])  # fmt: skip
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        rj.attention(*arrays(), **options)


@pytest.mark.parametrize("options, message", [
    (dict(layout="zigzg"), "unknown layout 'zigzg'.*did you mean 'zigzag'"),
    (dict(strategy="rings"), "unknown strategy 'rings'; the strategies are 'ring'"),
    (dict(ulysses_size=2), "ulysses_size 2 means nothing to strategy 'ring'"),
    (dict(strategy="hybrid", ulysses_size=3), "ulysses_size 3 does not divide the 4 devices"),
])  # fmt: skip
def test_sharded_options(options, message):
    with pytest.raises(ValueError, match=message):
        rj.sharded_attention(*arrays(), mesh=cases.mesh(4), **options)


@pytest.mark.parametrize("axes, inputs, message", [
    (dict(), dict(length=10), "seq_len 10 cannot be cut into 4 shards for layout 'striped'; pad to 12"),
    (dict(tp=2), dict(heads=3, kv_heads=1), "tp = 2 cannot share 3 query and 1 key/value heads evenly"),
    (dict(tp=2), dict(heads=6, kv_heads=3), "tp = 2 cannot share 6 query and 3 key/value heads evenly"),
])  # fmt: skip
def test_what_does_not_fit_the_mesh(axes, inputs, message):
    with pytest.raises(ValueError, match=message):
        rj.sharded_attention(*arrays(**inputs), mesh=cases.mesh(4, **axes))


def test_batch_that_does_not_fit_the_mesh():
    q, k, v = (x[:1] for x in arrays())
    with pytest.raises(ValueError, match="batch 1 is not divisible by dp·fsdp = 2"):
        rj.sharded_attention(q, k, v, mesh=cases.mesh(4, dp=2))


def test_heads_that_ulysses_cannot_split():
    with pytest.raises(NotImplementedError, match="ulysses over 4 devices cannot split 6 query and 3 key/value heads"):
        rj.sharded_attention(*arrays(heads=6, kv_heads=3), mesh=cases.mesh(4), strategy="ulysses")


def test_nan_inputs_in_debug_mode():
    q, k, v = arrays()
    k = k.at[1, 3, 0, 2].set(jnp.nan)
    message = r"k holds 1 NaN, the first at index \(1, 3, 0, 2\)"
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match=message):
            rj.attention(q, k, v)
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(jax.jit(rj.attention)(q, k, v))
