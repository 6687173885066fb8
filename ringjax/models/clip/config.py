"""What a CLIP vision transformer looks like, checked when it is read."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp

from ringjax.json_text import brief
from ringjax.models.config import Dtype

# Generous bounds, so that a size read from a damaged file is refused before anything is built, or counted, up to it.
_LARGEST = {"layers": 1 << 12, "image_size": 1 << 13}
_LARGEST_SIZE = 1 << 24

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a vision transformer; the defaults are those of CLIP ViT-L/14 at 336 pixels, less its last block.

    Raises ValueError for sizes that do not fit each other.
    """

    width: int = 1024
    """D, the size of the residual stream."""
    ffn_width: int = 4096
    """Inner size of the feed-forward."""
    layers: int = 23
    """Blocks that are built: those behind the last hidden state that somebody reads are not needed."""
    heads: int = 16
    """N, attention heads."""
    image_size: int = 336
    """Height and width of a picture."""
    patch_size: int = 14
    """Height and width of the patch that becomes one token."""
    channels: int = 3
    """Colours of a pixel."""
    activation: Activation = "quick_gelu"
    """Between the two layers of the feed-forward."""
    norm_eps: float = 1e-5
    """Added to LayerNorm's variance."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    dtype: Dtype = "float32"
    """Of activations and matrix products."""
    param_dtype: Dtype = "float32"
    """Of stored parameters."""

    def __post_init__(self):
        for name in ("width", "ffn_width", "layers", "heads", "image_size", "patch_size", "channels"):
            value = getattr(self, name)
            most = _LARGEST.get(name, _LARGEST_SIZE)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} {brief(value)} must be a whole number from 1 to {most}")
        for name in ("norm_eps", "init_std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise ValueError(f"{name} {brief(value)} must be a number between 0 and 1")
        for name, choices in (("activation", Activation), ("dtype", Dtype), ("param_dtype", Dtype)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"{name} {brief(getattr(self, name))} is not one of {known}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}; use a number that does")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}: pixels at the edge would"
                " be left out; use a size that it divides"
            )

    @property
    def patches(self) -> int:
        """Patches of a picture: its tokens without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_size(self) -> int:
        """H, the size of a head."""
        return self.width // self.heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a type."""
        return jnp.dtype(self.dtype)

    @property
    def storage_dtype(self) -> jnp.dtype:
        """`param_dtype` as a type."""
        return jnp.dtype(self.param_dtype)
