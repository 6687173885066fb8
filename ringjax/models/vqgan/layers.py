"""Encoder and decoder of the VQGAN: residual blocks and changes of resolution.

All pictures are `[B, H, W, C]`. Names follow the papers (Esser et al. 2021, arXiv:2012.09841; without attention as in
aMUSEd, Patil et al. 2024, arXiv:2401.01808); `files.py` maps them to the names of published weights.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ringjax.models.vqgan.config import VQGANConfig

Dtype = jnp.dtype | None
"""What is computed in, None: float32. Weights and the statistics of norms are float32 whatever it is."""


def _conv3(width_in: int, width_out: int, rngs: nnx.Rngs, dtype: Dtype) -> nnx.Conv:
    return nnx.Conv(width_in, width_out, (3, 3), rngs=rngs, dtype=dtype)


def _norm(width: int, config: VQGANConfig, rngs: nnx.Rngs, dtype: Dtype) -> nnx.GroupNorm:
    return nnx.GroupNorm(width, config.norm_groups, epsilon=1e-6, rngs=rngs, dtype=dtype)


class ResidualBlock(nnx.Module):
    """`shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`; the shortcut is 1×1 where the width changes."""

    def __init__(self, width_in: int, width_out: int, config: VQGANConfig, rngs: nnx.Rngs, dtype: Dtype = None):
        self.norm1 = _norm(width_in, config, rngs, dtype)
        self.conv1 = _conv3(width_in, width_out, rngs, dtype)
        self.norm2 = _norm(width_out, config, rngs, dtype)
        self.conv2 = _conv3(width_out, width_out, rngs, dtype)
        same = width_in == width_out
        self.shortcut = None if same else nnx.Conv(width_in, width_out, (1, 1), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


def _residual_blocks(
    count: int, width_in: int, width_out: int, config: VQGANConfig, rngs: nnx.Rngs, dtype: Dtype
) -> nnx.List:
    widths = [width_in] + [width_out] * count
    return nnx.List([ResidualBlock(a, b, config, rngs, dtype) for a, b in zip(widths, widths[1:])])


class Downsample(nnx.Module):
    """Half the resolution: 3×3, stride 2, padded below and to the right only."""

    def __init__(self, width: int, rngs: nnx.Rngs, dtype: Dtype = None):
        self.conv = nnx.Conv(width, width, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the resolution: every pixel four times, then 3×3."""

    def __init__(self, width: int, rngs: nnx.Rngs, dtype: Dtype = None):
        self.conv = _conv3(width, width, rngs, dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Level(nnx.Module):
    """Residual blocks at one resolution, then the change to the next one, if there is a next one."""

    def __init__(
        self,
        blocks: int,
        width_in: int,
        width_out: int,
        resize: nnx.Module | None,
        config: VQGANConfig,
        rngs: nnx.Rngs,
        dtype: Dtype = None,
    ):
        self.blocks = _residual_blocks(blocks, width_in, width_out, config, rngs, dtype)
        self.resize = resize

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        for block in self.blocks:
            x = block(x)
        return x if self.resize is None else self.resize(x)


class Encoder(nnx.Module):
    """Pixels to latents: `[B, resolution, resolution, channels] -> [B, grid, grid, z_channels]`."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs, dtype: Dtype = None):
        self.conv_in = _conv3(config.channels, config.hidden, rngs, dtype)
        levels, width_in = [], config.hidden
        for width in config.widths:
            resize = Downsample(width, rngs, dtype) if len(levels) < len(config.widths) - 1 else None
            levels.append(Level(config.res_blocks, width_in, width, resize, config, rngs, dtype))
            width_in = width
        self.levels = nnx.List(levels)
        self.middle = _residual_blocks(2, width_in, width_in, config, rngs, dtype)
        self.norm_out = _norm(width_in, config, rngs, dtype)
        self.conv_out = _conv3(width_in, config.z_channels, rngs, dtype)

    def __call__(self, pixels: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        x = self.conv_in(pixels)
        for stage in (*self.levels, *self.middle):
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents to pixels, deepest level first: `[B, grid, grid, z_channels] -> [B, resolution, resolution, C]`."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs, dtype: Dtype = None):
        width_in = config.widths[-1]
        self.conv_in = _conv3(config.z_channels, width_in, rngs, dtype)
        self.middle = _residual_blocks(2, width_in, width_in, config, rngs, dtype)
        levels = []
        for width in reversed(config.widths):
            resize = Upsample(width, rngs, dtype) if len(levels) < len(config.widths) - 1 else None
            levels.append(Level(config.res_blocks + 1, width_in, width, resize, config, rngs, dtype))
            width_in = width
        self.levels = nnx.List(levels)
        self.norm_out = _norm(width_in, config, rngs, dtype)
        self.conv_out = _conv3(width_in, config.channels, rngs, dtype)

    def __call__(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        return self.conv_out(self.features(latents))

    def features(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W D"]:
        """What the last convolution sees."""
        x = self.conv_in(latents)
        for stage in (*self.middle, *self.levels):
            x = stage(x)
        return jax.nn.silu(self.norm_out(x))
