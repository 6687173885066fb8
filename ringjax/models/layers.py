"""The parts of a block. Parameters carry the names of their axes, which `parallel.py` puts on the mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from ringjax.attention.kernels.base import target
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel

FEWEST_ROWS = 8


class Weight(nnx.Module):
    """A parameter called `kernel`, drawn from a normal distribution; `axes` are logical axes."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], config: ModelConfig, rngs: nnx.Rngs):
        value = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(value.astype(config.storage_dtype), axes=axes)


class LowRank(nnx.Module):
    """What an adapter adds to a linear layer: `scale · (x · a) · b` (`ringjax.models.lora`)."""

    def __init__(self, a: nnx.Param, b: nnx.Param, scale: float):
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: Float[Array, "B T I"], parallel: Parallel) -> Float[Array, "B T O"]:
        inputs, outputs = (part.get_metadata()["axes"][-2:] for part in (self.a, self.b))
        narrow = linear(x, self.a[...], inputs, parallel)
        return linear(narrow * jnp.asarray(self.scale, narrow.dtype), self.b[...], outputs, parallel)

    @property
    def delta(self) -> Float[Array, "*layers I O"]:
        """The same as a matrix, float32."""
        return self.scale * (self.a[...].astype(jnp.float32) @ self.b[...].astype(jnp.float32))


class Linear(Weight):
    """`y = x · kernel (+ bias)`, without any communication but the sum over a cut input."""

    def __init__(
        self, inputs: int, outputs: int, axes: tuple[str, str], config: ModelConfig, rngs: nnx.Rngs, bias: bool = False
    ):
        super().__init__((inputs, outputs), axes, config, rngs)
        self.bias = nnx.Param(jnp.zeros((outputs,), config.storage_dtype), axes=(axes[1],)) if bias else None
        self.low_rank: LowRank | None = nnx.data(None)

    @property
    def whole(self) -> Float[Array, "*layers I O"]:
        """The matrix that the layer multiplies by: the kernel, with its adapter where it has one."""
        return self.kernel[...] if self.low_rank is None else self.kernel[...] + self.low_rank.delta

    def __call__(self, x: Float[Array, "B T I"], parallel: Parallel) -> Float[Array, "B T O"]:
        y = linear(x, self.kernel[...], self.kernel.get_metadata()["axes"][-2:], parallel)
        if self.low_rank is not None:
            y = y + self.low_rank(x, parallel)
        if self.bias is None:
            return y
        # Added in float32, so that the gradient of the bias is summed in float32.
        return (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(
    x: Float[Array, "B T I"], kernel: Float[Array, "I O"], axes: tuple[str, str], parallel: Parallel
) -> Float[Array, "B T O"]:
    """`x · kernel` in x's type, with the kernel's gradient summed in float32 over tokens and devices.

    The kernel is stored in pieces and gathered here, in x's type; the backward pass gathers it again, not to keep it.
    """
    return _linear_forward(x, kernel, axes, parallel)[0]


def _gathered(kernel, axes, dtype, parallel: Parallel):
    whole = [None if axis == "embed" else axis for axis in axes]
    return parallel.constrain(kernel.astype(dtype), *whole)


def _features(axis: str) -> str | None:
    return None if axis == "embed" else axis


def _some_rows(x: Float[Array, "B T I"]) -> Float[Array, "B T2 I"]:
    """Zeros after a few tokens, on GPUs: a single one XLA multiplies into a whole matrix of products, which it writes
    and reads again to sum it (jaxlib 0.11.2); with eight it calls a matrix product, which reads the kernel once."""
    missing = -(-FEWEST_ROWS // x.shape[0]) - x.shape[1]
    if missing <= 0 or target().platform != "gpu":
        return x
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0)))


def _linear_forward(x, kernel, axes, parallel: Parallel):
    y = jnp.einsum("bti,io->bto", _some_rows(x), _gathered(kernel, axes, x.dtype, parallel))[:, : x.shape[1]]
    return parallel.constrain(y, "batch", "sequence", _features(axes[1])), (x, kernel)


def _linear_backward(axes, parallel: Parallel, residuals, dy):
    x, kernel = residuals
    dx = jnp.einsum("bto,io->bti", dy, _gathered(kernel, axes, x.dtype, parallel))
    dkernel = jnp.einsum("bti,bto->io", x, dy, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    dkernel = parallel.constrain(dkernel, *axes)
    return parallel.constrain(dx, "batch", "sequence", _features(axes[0])), dkernel.astype(kernel.dtype)


linear.defvjp(_linear_forward, _linear_backward)


class RMSNorm(nnx.Module):
    """`x / √(mean(x²) + eps) · kernel`, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, config: ModelConfig):
        self.eps = config.norm_eps
        self.kernel = nnx.Param(jnp.ones((width,), config.storage_dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.kernel[...].astype(wide.dtype)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of token vectors."""

    def __init__(self, vocab_size: int, config: ModelConfig, rngs: nnx.Rngs):
        value = config.init_std * jax.random.normal(rngs.params(), (vocab_size, config.width), jnp.float32)
        self.embedding = nnx.Param(value.astype(config.storage_dtype), axes=("vocab", "embed"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def look_up(
    table: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    here: Bool[Array, "B T"],
    dtype: jnp.dtype,
    parallel: Parallel,
) -> Float[Array, "B T D"]:
    """The rows of `table` for the tokens that are `here`, 0 for the others; a token outside the table gives NaN.

    Each device looks up its own tokens in its own part of the vocabulary; the sum over tp completes them. Gradients are
    summed in float32.
    """
    return _look_up_forward(table, tokens, here, dtype, parallel)[0]


def _look_up_specs(table, tokens, parallel: Parallel) -> tuple[P, P, P]:
    ids = parallel.spec_for(tokens.shape, "batch", "sequence")
    return parallel.param_spec(table.shape, ("vocab", "embed")), ids, P(*ids, None)


def _own_rows(tokens, here, rows: int, parallel: Parallel):
    """Indices into this device's `rows` rows; out of range for tokens that are another's or not `here`."""
    first = jax.lax.axis_index("tp") * rows if parallel.present("tp") else 0
    row = tokens - first
    return jnp.where(here & (row >= 0) & (row < rows), row, rows)


def _look_up_forward(table, tokens, here, dtype, parallel: Parallel):
    table_spec, ids_spec, out_spec = _look_up_specs(table, tokens, parallel)
    vocab_size = table.shape[0]

    def local(table, tokens, here):
        table = parallel.gather_weight(table, table_spec, dtype)
        found = table.at[_own_rows(tokens, here, table.shape[0], parallel)].get(mode="fill", fill_value=0)
        outside = here & ((tokens < 0) | (tokens >= vocab_size))
        return jnp.where(outside[..., None], jnp.nan, parallel.sum_over(found, "tp"))

    found = parallel.local(local, (table_spec, ids_spec, ids_spec), out_spec)(table, tokens, here)
    return found, (table, tokens, here)


def _look_up_backward(dtype, parallel: Parallel, residuals, dout):
    table, tokens, here = residuals
    table_spec, ids_spec, out_spec = _look_up_specs(table, tokens, parallel)
    rows, wide = table.shape[0] // parallel.size("tp"), jnp.promote_types(table.dtype, jnp.float32)

    def local(tokens, here, dout):
        total = jnp.zeros((rows, dout.shape[-1]), wide)
        total = total.at[_own_rows(tokens, here, rows, parallel)].add(dout.astype(wide), mode="drop")
        return parallel.reduce_weight(total, table_spec)

    dtable = parallel.local(local, (ids_spec, ids_spec, out_spec), table_spec)(tokens, here, dout)
    return dtable.astype(table.dtype), None, None


look_up.defvjp(_look_up_forward, _look_up_backward)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`make(rngs)` `count` times as one module whose parameters have a leading layers axis, for a scan."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(params=key))))(keys)
    together = jax.tree.map(
        lambda leaf: leaf.replace(leaf.get_value(), axes=("layers", *leaf.get_metadata()["axes"])),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return nnx.merge(graph, together)
