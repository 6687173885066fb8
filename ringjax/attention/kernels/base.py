"""The contract between the ring and the kernels that attend on one device.

    forward (q, k, v, lo, hi, …)                         -> out, lse
    backward(q, k, v, out, lse, dout, delta, lo, hi, …)  -> dq, dk, dv

Query t of row b sees the keys in slots `lo[b, t] … hi[b, t] − 1` of this call's K and V. The backward pass is
fed the MERGED out and lse of all keys, not those of this call: then p = exp(s − lse) is already the global
softmax, and a ring's gradient is exact. `delta = rowsum(dout · out) − dlse` is the other thing that crosses
hops; the last term makes lse differentiable too.

Where it is known without data that every query sees every key, or query i the first i + 1 (`patterns.py`), a kernel
may serve that as a `Dense` pass, without lo and hi.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ringjax.attention.merge import Partial


@dataclasses.dataclass(frozen=True)
class Score:
    """What turns q·k into a score: `scale`, then `softcap · tanh(s / softcap)` where a softcap is given."""

    scale: float
    softcap: float | None = None

    def __call__(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def gradient(self, scores: Float[Array, "..."]) -> Float[Array, "..."] | float:
        """d score / d (q·k), from the score itself."""
        return self.scale if self.softcap is None else self.scale * (1 - jnp.square(scores / self.softcap))


class Gradients(NamedTuple):
    """Of one call. Kernels that hold sums in float32 to the end return float32; others the type of the inputs. The
    ring sums over its hops in float32."""

    dq: Float[Array, "B T N H"]
    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K Hv"]


Forward = Callable[[Array, Array, Array, Int[Array, "B T"], Int[Array, "B T"], Score], Partial]


@dataclasses.dataclass(frozen=True)
class Dense:
    """Attention over rectangles that are seen whole, or `causal`: query i sees keys 0 … i, as many keys as queries.

        forward (q, k, v, causal, score)                         -> out, lse
        backward(q, k, v, out, lse, dout, delta, causal, score)  -> dq, dk, dv

    `takes_delta`: the backward pass uses the `delta` it is given. Where it computes rowsum(dout · out) itself, lse has
    no gradient.
    """

    forward: Callable[[Array, Array, Array, bool, Score], Partial]
    backward: Callable[..., Gradients]
    takes_delta: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A backend: what it computes, and why it cannot be used where it cannot.

    `forward` and `backward` serve any intervals (None: it has none), `dense` the rectangles of `Dense`.
    `unavailable()` says why the target cannot run it (None: it can). `refuses(q, k, v, score)` says why it does not
    serve these inputs (None: it does); shapes and dtypes are known when a function is traced. `fused`: it is one
    program on the device, which rounds its results to the type of the inputs. `separate`: its backward pass finds dQ,
    and dK and dV, in programs of their own.
    """

    name: str
    forward: Forward | None
    backward: Callable[..., Gradients] | None
    unavailable: Callable[[], str | None] = lambda: None
    refuses: Callable[[Array, Array, Array, Score], str | None] = lambda q, k, v, score: None
    dense: Dense | None = None
    fused: bool = False
    separate: bool = False


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels that serve a call: `interval` for masks that are data, `dense` for rectangles. Either may be None."""

    interval: Kernel | None
    dense: Kernel | None = None

    @property
    def fused(self) -> bool:
        """Whether all results come in the type of the inputs."""
        return all(kernel.fused for kernel in (self.interval, self.dense) if kernel is not None)

    @property
    def either(self) -> bool:
        """Whether rectangles and other intervals have different kernels."""
        return self.dense is not None and self.interval is not None and self.dense is not self.interval

    def with_gradient_of_lse(self) -> "Kernels":
        """Those of them whose backward pass also serves lse. Raises NotImplementedError where none is left."""
        if self.dense is None or self.dense.dense.takes_delta:
            return self
        if self.interval is None:
            raise NotImplementedError(
                f"backend {self.dense.name!r} has no gradient of lse, which return_lse=True asks for; leave it out,"
                " or use backend='auto'"
            )
        return Kernels(self.interval)


class Target(NamedTuple):
    """What a function is being traced for: 'cpu', 'gpu' or 'tpu', and the kind of device, as JAX names them."""

    platform: str
    device_kind: str


def target() -> Target:
    """Inside `shard_map` the devices of its mesh, which may be a description of ones that are elsewhere (compilation
    ahead of time); outside, this process's default device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform is not None:
        return Target(_platform(described.platform), described.device_kind)
    device = jax.local_devices()[0]
    return Target(_platform(device.platform), device.device_kind)


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name


def accumulator(*arrays: Array) -> jnp.dtype:
    """float32 for sums and statistics; float64 when the inputs are."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def product(pattern: str, a: Array, b: Array) -> Array:
    """An einsum with its sum in float32. float32 inputs are multiplied as float32, not as TF32 or bfloat16."""
    dtype = accumulator(a, b)
    precision = None if a.dtype == jnp.bfloat16 == b.dtype else lax.Precision.HIGHEST
    return jnp.einsum(pattern, a, b, precision=precision, preferred_element_type=dtype)


def varying_like(x, *references):
    """`x` (a pytree), typed as varying over the mesh axes over which any of `references` varies.

    `shard_map` with check_vma tracks these; loop carries and the branches of a cond must agree on them.
    """
    axes = frozenset().union(*(jax.typeof(r).manual_axis_type.varying for r in jax.tree.leaves(references)))

    def vary(leaf):
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, x)
