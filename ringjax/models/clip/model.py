"""The vision transformer of CLIP (Radford et al. 2021, arXiv:2103.00020): a picture's patches as a sequence of vectors.

    x = LayerNorm([class; patches · kernel] + position)          [B, 1 + P, D]
    x = x + attention(norm1(x));   x = x + fc2(act(fc1(norm2(x))))        in every block

Pictures are independent, so on a mesh every device has its own share of them, along all axes but tp.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ringjax.attention import attention
from ringjax.models.clip.config import ClipConfig
from ringjax.models.layers import Linear, stacked
from ringjax.models.parallel import Parallel

_ONE_DEVICE = Parallel()

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class LayerNorm(nnx.Module):
    """`(x − mean) / √(variance + eps) · kernel + bias`, computed in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, config: ClipConfig):
        self.eps = config.norm_eps
        self.kernel = nnx.Param(jnp.ones((config.width,), config.storage_dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((config.width,), config.storage_dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(variance + self.eps)
        return (normed * self.kernel[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)).astype(x.dtype)


def affine(layer: Linear, x: Float[Array, "B T I"], parallel: Parallel) -> Float[Array, "B T O"]:
    """`x · kernel (+ bias)` for pictures: cut over them and over tp, with the kernel whole but for tp."""
    axes = [None if axis == "embed" else axis for axis in layer.kernel.get_metadata()["axes"][-2:]]
    kernel = parallel.constrain(layer.kernel[...].astype(x.dtype), *axes)
    y = jnp.einsum("bti,io->bto", x, kernel)
    y = y if layer.bias is None else y + layer.bias[...].astype(y.dtype)
    return parallel.constrain(y, "images", None, axes[1])


class ClipBlock(nnx.Module):
    """Attention of all tokens of a picture to each other, then a feed-forward; both with biases."""

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        self.config = config
        into, back = ("embed", "heads"), ("heads", "embed")
        width, inner = config.width, config.ffn_width
        self.norm1 = LayerNorm(config)
        self.wq, self.wk, self.wv = (Linear(width, width, into, config, rngs, bias=True) for _ in range(3))
        self.wo = Linear(width, width, back, config, rngs, bias=True)
        self.norm2 = LayerNorm(config)
        self.fc1 = Linear(width, inner, ("embed", "ffn"), config, rngs, bias=True)
        self.fc2 = Linear(inner, width, ("ffn", "embed"), config, rngs, bias=True)

    def __call__(self, x: Float[Array, "B T D"], parallel: Parallel) -> Float[Array, "B T D"]:
        x = x + self._attend(self.norm1(x), parallel)
        inner = ACTIVATIONS[self.config.activation](affine(self.fc1, self.norm2(x), parallel))
        return x + affine(self.fc2, inner, parallel)

    def _attend(self, x, parallel: Parallel):
        q, k, v = (
            rearrange(affine(layer, x, parallel), "b t (n h) -> b t n h", n=self.config.heads)
            for layer in (self.wq, self.wk, self.wv)
        )
        spec = parallel.spec_for(q.shape, "images", None, "heads", None)

        def local(q, k, v):
            return attention(q, k, v, causal=False, backend=parallel.backend)

        attended = parallel.local(local, (spec, spec, spec), spec)(q, k, v)
        return affine(self.wo, rearrange(attended, "b t n h -> b t (n h)"), parallel)


class ClipVision(nnx.Module):
    """Pictures to hidden states; see `ClipConfig`. The norm after the last block is left out: only pooling needs it."""

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        self.config = config
        size, std, dtype = config.patch_size, config.init_std, config.storage_dtype
        draw = lambda *shape: std * jax.random.normal(rngs.params(), shape, dtype)  # noqa: E731
        # Columns before rows, as the published kernel lies when all its axes are turned around.
        axes = (None, None, None, "embed")
        self.patch_kernel = nnx.Param(draw(size, size, config.channels, config.width), axes=axes)
        self.class_token = nnx.Param(draw(config.width), axes=("norm",))
        self.position = nnx.Param(draw(1 + config.patches, config.width), axes=(None, "embed"))
        self.norm_in = LayerNorm(config)
        self.h = stacked(lambda rngs: ClipBlock(config, rngs), config.layers, rngs)

    @classmethod
    def abstract(cls, config: ClipConfig) -> "ClipVision":
        """The model with shapes in place of arrays: nothing is allocated."""
        return nnx.eval_shape(lambda: cls(config, nnx.Rngs(0)))

    def hidden_states(
        self, pixels: Float[Array, "B H W C"], depths: Sequence[int], parallel: Parallel = _ONE_DEVICE
    ) -> list[Float[Array, "B P+1 D"]]:
        """The stream after each of so many blocks (1 … layers): the class token first, then the patches row by row.

        Raises ValueError for pictures of another size, or a depth that is not there.
        """
        config = self.config
        wanted = (config.image_size, config.image_size, config.channels)
        if pixels.ndim != 4 or pixels.shape[1:] != wanted or pixels.dtype.kind != "f":
            raise ValueError(f"pixels are {pixels.dtype}{list(pixels.shape)}; give floats {['B', *wanted]}")
        outside = [depth for depth in depths if not 1 <= depth <= config.layers]
        if outside or not depths:
            raise ValueError(f"depths {list(depths)} must be some of 1 … {config.layers}, the blocks of this model")
        with jax.named_scope("clip"):
            graph, blocks = nnx.split(self.h)

            def block(x, state):
                x = nnx.merge(graph, state)(x, parallel)
                return x, None if last_only else x

            last_only = set(depths) == {config.layers}
            last, every = lax.scan(block, self._embed(pixels, parallel), blocks)
            return [last if depth == config.layers else every[depth - 1] for depth in depths]

    def _embed(self, pixels, parallel: Parallel) -> Float[Array, "B P+1 D"]:
        size, dtype = self.config.patch_size, self.config.compute_dtype
        patches = rearrange(pixels.astype(dtype), "b (y h) (x w) c -> b (y x) (w h c)", h=size, w=size)
        patches = parallel.constrain(patches, "images", None, None)
        kernel = parallel.constrain(self.patch_kernel[...].astype(dtype), None, None, None, None)
        x = patches @ rearrange(kernel, "w h c d -> (w h c) d")
        first = jnp.broadcast_to(self.class_token[...].astype(dtype), (len(x), 1, self.config.width))
        x = jnp.concatenate([first, x], axis=1) + self.position[...].astype(dtype)
        return parallel.constrain(self.norm_in(x), "images", None, None)
