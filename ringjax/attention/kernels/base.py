"""The contract between the ring and the kernels that attend on one device.

    forward (q, k, v, lo, hi, …)                         -> out, lse
    backward(q, k, v, out, lse, dout, delta, lo, hi, …)  -> dq, dk, dv

Query t of row b sees the keys in slots `lo[b, t] … hi[b, t] − 1` of this call's K and V. The backward pass is
fed the MERGED out and lse of all keys, not those of this call: then p = exp(s − lse) is already the global
softmax, and a ring's gradient is exact. `delta = rowsum(dout · out) − dlse` is the other thing that crosses
hops; the last term makes lse differentiable too.
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
    """float32, whatever the inputs are: they are summed over the hops of a ring."""

    dq: Float[Array, "B T N H"]
    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K Hv"]


Forward = Callable[[Array, Array, Array, Int[Array, "B T"], Int[Array, "B T"], Score], Partial]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A backend: its two functions, and why it cannot be used where it cannot.

    `unavailable()` says why this machine cannot run it (None: it can). `refuses(q, k, v)` says why it does not
    serve these inputs (None: it does); shapes and dtypes are known when a function is traced.
    """

    name: str
    forward: Forward
    backward: Callable[..., Gradients]
    unavailable: Callable[[], str | None] = lambda: None
    refuses: Callable[[Array, Array, Array], str | None] = lambda q, k, v: None


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
