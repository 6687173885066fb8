"""Attention over any intervals on Hopper GPUs, in Pallas's Mosaic GPU dialect.

    tiles            which blocks of keys a tile of queries meets, and the other way round
    forward_kernel   out and lse
    backward_kernel  dQ; dK and dV
    split_kernel     a few queries over a long cache
    parts            what they share

Both passes skip what lies outside the intervals, so packed documents and windows cost what they compute.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ringjax.attention.kernels.base import Gradients, Kernel, Score, target
from ringjax.attention.kernels.mosaic.tiles import padded
from ringjax.attention.merge import Partial

OLDEST_JAX = (0, 11, 1)
HEAD_MULTIPLE, LARGEST_HEAD, LENGTH_MULTIPLE = 64, 128, 8
FEW_ROWS = 64


def forward(q: Array, k: Array, v: Array, lo: Array, hi: Array, score: Score) -> Partial:
    """As `reference.forward`; out in the type of the inputs, lse float32."""
    from ringjax.attention.kernels.mosaic import forward_kernel

    length, v_dim = q.shape[1], v.shape[-1]
    lo, hi = _clipped(lo, hi, k.shape[1])
    out, lse = forward_kernel.forward(*map(_filled, (q, k, v)), lo, hi, score)
    return Partial(out[:, :length, :, :v_dim], lse[..., :length])


def backward(q, k, v, out, lse, dout, delta, lo, hi, score: Score) -> Gradients:
    """As `reference.backward`, in the type of the inputs."""
    from ringjax.attention.kernels.mosaic import backward_kernel

    del out  # delta holds all that is needed of it
    lse, delta = (padded(lse, LENGTH_MULTIPLE, -jnp.inf), padded(delta, LENGTH_MULTIPLE, 0))
    lo, hi = _clipped(lo, hi, k.shape[1])
    q_, k_, v_, dout = map(_filled, (q, k, v, dout.astype(q.dtype)))
    grads = backward_kernel.backward(q_, k_, v_, lse, dout, delta, lo, hi, score)
    return Gradients(*(grad[:, : x.shape[1], :, : x.shape[3]] for grad, x in zip(grads, (q, k, v))))


def unavailable() -> str | None:
    """Why the target cannot run it: no Hopper GPU, or a JAX that is too old."""
    platform, kind = target()
    if platform != "gpu":
        return f"needs an NVIDIA Hopper GPU, not a {platform}"
    capability = _capability()
    if capability is not None and capability[0] != 9:
        return f"is written for Hopper (compute capability 9.x), and {kind} has {capability[0]}.{capability[1]}"
    if jax.__version_info__ < OLDEST_JAX:
        return f"needs jax {'.'.join(map(str, OLDEST_JAX))} or newer, not {jax.__version__}"
    return None


def refuses(q: Array, k: Array, v: Array, score: Score) -> str | None:
    """Why it does not serve these inputs."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"type {q.dtype} is neither bfloat16 nor float16"
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        return f"head size {max(q.shape[-1], v.shape[-1])} is above {LARGEST_HEAD}"
    if score.scale <= 0:
        return f"scale {score.scale} is not positive"
    return None


def refuses_few(q: Array, k_caches: Array, v_caches: Array, score: Score) -> str | None:
    """Why `split_kernel` does not serve these inputs (caches `[layers, B, S, K, H]`), or the target cannot run it.

    Nothing is filled up with zeros here, as for longer queries: it would copy the cache for every token.
    """
    if reason := unavailable() or refuses(q, k_caches, v_caches, score):
        return reason
    rows = q.shape[1] * q.shape[2] // k_caches.shape[3]
    if rows > FEW_ROWS:
        return f"{rows} queries a key/value head are more than {FEW_ROWS}"
    if k_caches.shape[2] % LENGTH_MULTIPLE:
        return f"{k_caches.shape[2]} slots of the cache are no multiple of {LENGTH_MULTIPLE}"
    for size in (q.shape[-1], v_caches.shape[-1]):
        if size % HEAD_MULTIPLE:
            return f"head size {size} is no multiple of {HEAD_MULTIPLE}"
    return None


def _filled(x: Array) -> Array:
    """Heads and length filled up with zeros to sizes that the matrix units and the copy engine take: the zeros add
    nothing to a product, and nobody sees the keys."""
    missing = -x.shape[1] % LENGTH_MULTIPLE, -x.shape[3] % HEAD_MULTIPLE
    return jnp.pad(x, [(0, 0), (0, missing[0]), (0, 0), (0, missing[1])]) if any(missing) else x


def _clipped(lo: Array, hi: Array, keys: int) -> tuple[Array, Array]:
    """Intervals within the keys there are; queries that fill up see nothing."""
    return tuple(padded(jnp.clip(x, 0, keys), LENGTH_MULTIPLE, 0) for x in (lo, hi))


def _capability() -> tuple[int, int] | None:
    for device in jax.local_devices():
        if hasattr(device, "compute_capability"):
            major, minor = str(device.compute_capability).split(".")
            return int(major), int(minor)
    return None


KERNEL = Kernel("mosaic", forward, backward, unavailable=unavailable, refuses=refuses, fused=True, separate=True)
