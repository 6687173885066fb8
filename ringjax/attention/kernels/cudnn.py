"""cuDNN's fused attention on NVIDIA GPUs, for hops that are seen whole or causal.

It is called below `jax.nn.dot_product_attention`, whose lse is rounded to the type of the inputs (three digits lost at
every merge) and whose gradient knows only its own keys. The primitives underneath give lse in float32 and take the lse
and out of all keys. They are private to JAX; `tests/attention/test_cudnn.py` pins their signatures.

cuDNN computes rowsum(dout · out) itself, so there is no gradient of lse here.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ringjax.attention.kernels.base import Dense, Gradients, Kernel, Score, target
from ringjax.attention.merge import Partial

OLDEST_CUDNN = 91000  # 9.10: the first whose float32 statistics and gradients were checked here
LARGEST_HEAD = {8: 128, 9: 256, 10: 128}  # by major compute capability


def forward(q: Array, k: Array, v: Array, causal: bool, score: Score) -> Partial:
    """As `Dense.forward`; out in the type of the inputs, lse float32."""
    primitive, _ = _primitives()
    return Partial(*primitive.bind(*_operands(q, k, v), is_training=True, **_options(causal, score)))


def backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, dout: Array, delta: Array, causal: bool, score: Score
) -> Gradients:
    """As `Dense.backward`, in the type of the inputs."""
    del delta  # computed inside from out and dout
    _, primitive = _primitives()
    return Gradients(*primitive.bind(*_operands(q, k, v), lse, out, dout, **_options(causal, score)))


def unavailable() -> str | None:
    """Why the target cannot run it: no NVIDIA GPU, an old one, or a JAX whose private interface is another."""
    platform, kind = target()
    if platform != "gpu":
        return f"needs an NVIDIA GPU, not a {platform}"
    if not _primitives():
        return f"jax {jax.__version__} has no private primitives for it with the known signature"
    return _too_old(kind)


def refuses(q: Array, k: Array, v: Array, score: Score) -> str | None:
    """Why it does not serve these inputs."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"type {q.dtype} is neither bfloat16 nor float16"
    if score.softcap is not None:
        return f"softcap {score.softcap} is not among its score functions"
    head, largest = q.shape[-1], LARGEST_HEAD.get(_capability()[0], 128)
    if v.shape[-1] != head:
        return f"head sizes {head} (keys) and {v.shape[-1]} (values) differ"
    if head % 8 or head > largest:
        return f"head size {head} is not a multiple of 8 up to {largest}"
    return None


@functools.cache
def _primitives():
    """The forward and backward primitives, or () where JAX keeps them elsewhere."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        return fused._dot_product_attention_fwd_p_wrapper, fused._dot_product_attention_bwd_p_wrapper
    except (ImportError, AttributeError):
        return ()


def _operands(q, k, v) -> tuple[Array, ...]:
    """Queries, keys, values, and nothing for bias, lengths, offsets and page tables."""
    # Taken from q so that no transformation carries an empty array out of a loop or a shard_map: on such an argument
    # the compiler crashes (Shardy's canonicalizer, jax 0.11.2).
    nothing = q[0, 0, 0, :0]
    return q, k, v, *[nothing] * 7


def _options(causal: bool, score: Score) -> dict:
    from jax._src.cudnn.fused_attention_stablehlo import AttentionLayout, MaskType

    options = dict(
        scale=score.scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), layout=AttentionLayout.BTNH.value,
        mask_type=MaskType.CAUSAL if causal else MaskType.NO_MASK, sliding_window_length=None,
    )  # fmt: skip
    return {**options, "score_mod": None} if jax.__version_info__ >= (0, 12) else options


def _capability() -> tuple[int, int]:
    """Of the GPU in this process; (9, 0) where there is none, as when compiling ahead of time."""
    for device in jax.local_devices():
        if hasattr(device, "compute_capability"):
            major, minor = str(device.compute_capability).split(".")
            return int(major), int(minor)
    return 9, 0


def _too_old(kind: str) -> str | None:
    if _capability() < (8, 0):
        return f"{kind} has compute capability {'.'.join(map(str, _capability()))}, below 8.0"
    version = _cudnn_version()
    if version is not None and version < OLDEST_CUDNN:
        return f"cuDNN {version} is older than {OLDEST_CUDNN}"
    return None


def _cudnn_version() -> int | None:
    try:
        from jax._src.lib import cuda_versions

        return None if cuda_versions is None else cuda_versions.cudnn_get_version()
    except (ImportError, AttributeError, RuntimeError):
        return None


KERNEL = Kernel(
    "cudnn", None, None, unavailable=unavailable, refuses=refuses, fused=True,
    dense=Dense(forward, backward, takes_delta=False),
)  # fmt: skip
