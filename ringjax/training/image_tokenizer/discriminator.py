"""The discriminator: for each patch of a picture, a number that is high where the patch looks real.

PatchGAN of Isola et al. 2016, arXiv:1611.07004, as in Esser et al. 2021, but with GroupNorm for BatchNorm: a picture's
score must not depend on which other pictures are in its batch, nor on how many devices share it.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_GROUPS = 32
_MOST = 8  # widths stop growing at this many times the first one


class PatchDiscriminator(nnx.Module):
    """4×4 convolutions: `layers` of stride 2, one of stride 1, and one to a single channel."""

    def __init__(self, channels: int, width: int, layers: int, rngs: nnx.Rngs, dtype: jnp.dtype | None = None):
        widths = [width * min(2**i, _MOST) for i in range(layers + 1)]

        def make(a: int, b: int, stride: int, bias: bool = True) -> nnx.Conv:
            return nnx.Conv(a, b, (4, 4), strides=stride, padding=1, use_bias=bias, rngs=rngs, dtype=dtype)

        self.conv_in = make(channels, widths[0], 2)
        pairs = list(zip(widths, widths[1:]))
        # No bias where a norm follows, which has its own: it would be noise, which Adam makes as large as signal.
        self.convs = nnx.List([make(a, b, 2 if i < layers - 1 else 1, bias=False) for i, (a, b) in enumerate(pairs)])
        self.norms = nnx.List(
            [nnx.GroupNorm(b, math.gcd(b, _GROUPS), rngs=rngs, epsilon=1e-6, dtype=dtype) for _, b in pairs]
        )
        self.conv_out = make(widths[-1], 1, 1)

    def __call__(self, pixels: Float[Array, "B H W C"]) -> Float[Array, "B h w"]:
        with jax.named_scope("discriminator"):
            x = jax.nn.leaky_relu(self.conv_in(pixels), 0.2)
            for conv, norm in zip(self.convs, self.norms):
                x = jax.nn.leaky_relu(norm(conv(x)), 0.2)
            return self.conv_out(x)[..., 0].astype(jnp.float32)


def smallest_picture(layers: int) -> int:
    """The smallest resolution whose patches do not vanish."""
    size = 1
    while _scores(size, layers) < 1:
        size += 1
    return size


def _scores(size: int, layers: int) -> int:
    for stride in [2] * layers + [1, 1]:
        size = (size + 2 - 4) // stride + 1 if size >= 2 else 0
    return size
