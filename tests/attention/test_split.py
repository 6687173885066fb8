"""The decoding kernel for Hopper, run by a simulation of a GPU on the CPU (docs/results has what hardware gave)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.attention import validate
from ringjax.attention.kernels import mosaic
from tests.attention import cases, oracle

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < mosaic.OLDEST_JAX, reason=f"the simulation needs jax {mosaic.OLDEST_JAX}"
)
SLOTS, LAYER = 900, 1


@pytest.mark.parametrize("new, heads, head_dim, lo, hi, options", [
    (1, (3, 1), 64, [[0], [640]], [[900], [700]], {}),
    (2, (2, 2), 128, [[0, 1], [5, 5]], [[1, 2], [5, 5]], {"softcap": 3.0}),
])  # fmt: skip
def test_equals_float64(monkeypatch, new, heads, head_dim, lo, hi, options):
    """Splits that are empty, queries that see nothing or one key, several queries of a head, one layer of several."""
    from ringjax.attention.kernels.mosaic import split_kernel
    from tests.attention.simulator import simulated

    monkeypatch.setattr(split_kernel, "MULTIPROCESSORS", 6)
    q, k, v, *_ = cases.inputs(2, new, *heads, head_dim, head_dim, jnp.bfloat16, keys=SLOTS)
    lo, hi = np.asarray(lo, np.int32), np.asarray(hi, np.int32)
    k, v = (jnp.stack([jnp.full_like(x, jnp.nan), x, jnp.full_like(x, jnp.nan)]) for x in (k, v))
    score = validate.score(None, options.get("softcap"), head_dim)
    with simulated():
        out, lse = split_kernel.forward(q, k, v, jnp.int32(LAYER), lo, hi, score)
    expected = oracle.attention(q, k[LAYER], v[LAYER], lo, hi, np.zeros(out.shape), np.zeros(lse.shape), **options)
    assert out.dtype == lse.dtype == jnp.float32
    assert oracle.error(lse, expected.lse) <= 1e-5 and oracle.error(out, expected.out) <= 1e-2


def test_has_no_races():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    from ringjax.attention.kernels.mosaic import split_kernel
    from tests.attention.simulator import simulated

    q, k, v, *_ = cases.inputs(1, 1, 2, 1, 64, 64, jnp.bfloat16, keys=800)
    bounds = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 800, jnp.int32)
    with simulated(detect_races=True):
        found = split_kernel.forward(q, k[None], v[None], jnp.int32(0), *bounds, validate.score(None, None, 64))
        jax.block_until_ready(found)
    assert not gpu_callbacks.get_races().races_found


def test_layers_share_one_kernel():
    """Each kernel that is compiled takes a second; a model has dozens of layers."""
    from ringjax.attention.kernels.mosaic import split_kernel

    q, cache = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 1, 4, 64), (3, 1, 256, 2, 64)))
    bounds, score = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * 2, validate.score(None, None, 64)

    def layers(q, k, v, lo, hi):
        for layer in range(3):
            q = split_kernel.forward(q, k, v, jnp.int32(layer), lo, hi, score).out.astype(q.dtype)
        return q

    lowered = jax.jit(layers).trace(q, cache, cache, *bounds).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("mosaic_gpu_v2") == 1


def test_what_it_refuses(monkeypatch):
    monkeypatch.setattr(mosaic, "unavailable", lambda: None)
    score = validate.score(None, None, 64)

    def reason(new=1, heads=4, slots=64, head_dim=64, dtype=jnp.bfloat16):
        cache = jax.ShapeDtypeStruct((2, 1, slots, 2, head_dim), dtype)
        return mosaic.refuses_few(jax.ShapeDtypeStruct((1, new, heads, head_dim), dtype), cache, cache, score)

    assert reason() is None
    assert "33 slots" in reason(slots=33) and "head size 32" in reason(head_dim=32)
    assert "66 queries" in reason(new=33) and "float32" in reason(dtype=jnp.float32)
