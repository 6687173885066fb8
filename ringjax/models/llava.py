"""LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744): a language model that sees pictures through a vision transformer.

    features = projector(hidden state of the vision transformer)      P vectors a picture, as wide as the language model
    hidden   = language(tokens, with the features where the image tokens are)

A picture's tokens are causal like text; P is 576 for pictures of 336 × 336 in patches of 14.
"""

import dataclasses
from typing import Literal, get_args

import jax
import numpy as np
from einops import rearrange
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from ringjax.attention import Reach
from ringjax.json_text import brief
from ringjax.models.clip import ACTIVATIONS, ClipConfig, ClipVision
from ringjax.models.clip.config import Activation
from ringjax.models.clip.model import affine
from ringjax.models.config import ModelConfig
from ringjax.models.features import Features
from ringjax.models.layers import Linear
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer

_ONE_DEVICE = Parallel()
Select = Literal["default", "full"]


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A language model, a vision transformer, and what lies between. Raises ValueError where they do not fit."""

    text: ModelConfig
    vision: ClipConfig
    image_token: int
    """The text id in whose places features stand."""
    depths: tuple[int, ...] = (23,)
    """Features are the stream after so many blocks of the vision transformer; of several, side by side."""
    select: Select = "default"
    """`default`: the patches; `full`: the class token before them too."""
    activation: Activation = "gelu"
    """Between the projector's two layers."""
    projector_bias: bool = True
    """Whether the projector's layers have biases."""

    def __post_init__(self):
        for name, choices in (("select", Select), ("activation", Activation)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"{name} {brief(getattr(self, name))} is not one of {known}")
        if not self.depths or not all(1 <= depth <= self.vision.layers for depth in self.depths):
            raise ValueError(f"depths {self.depths} must be some of 1 … {self.vision.layers}, the vision blocks")
        if isinstance(self.image_token, bool) or not isinstance(self.image_token, int) or self.image_token < 0:
            raise ValueError(f"image_token {brief(self.image_token)} must be the id of a token, a whole number from 0")
        if not isinstance(self.projector_bias, bool):
            raise ValueError(f"projector_bias {brief(self.projector_bias)} must be true or false")

    @property
    def features(self) -> int:
        """P, the vectors of a picture and the image tokens that stand for it."""
        return self.vision.patches + (self.select == "full")


class Projector(nnx.Module):
    """`linear2(act(linear1(x)))`, from the vision transformer's width to the language model's."""

    def __init__(self, config: LlavaConfig, rngs: nnx.Rngs):
        self.activation, bias = config.activation, config.projector_bias
        inputs, width = len(config.depths) * config.vision.width, config.text.width
        self.linear1 = Linear(inputs, width, ("embed", "ffn"), config.text, rngs, bias)
        self.linear2 = Linear(width, width, ("ffn", "embed"), config.text, rngs, bias)

    def __call__(self, x: Float[Array, "B P I"], parallel: Parallel) -> Float[Array, "B P D"]:
        return affine(self.linear2, ACTIVATIONS[self.activation](affine(self.linear1, x, parallel)), parallel)


class Llava(nnx.Module):
    """Pictures and text to the hidden states of the language model; see `LlavaConfig`."""

    def __init__(self, config: LlavaConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = ClipVision(config.vision, rngs)
        self.projector = Projector(config, rngs)
        self.language = Transformer(config.text, rngs)

    @classmethod
    def abstract(cls, config: LlavaConfig) -> "Llava":
        """The model with shapes in place of arrays: nothing is allocated."""
        return nnx.eval_shape(lambda: cls(config, nnx.Rngs(0)))

    def image_features(
        self, pixels: Float[Array, "B I H W C"], parallel: Parallel = _ONE_DEVICE
    ) -> Float[Array, "B I*P D"]:
        """The features of the I pictures of each row, one picture after the other (rows with fewer: any pixels)."""
        if pixels.ndim != 5:
            raise ValueError(f"pixels have shape {pixels.shape}; give the pictures of each row, [B, I, H, W, C]")
        pictures = rearrange(pixels, "b i h w c -> (b i) h w c")
        states = self.vision.hidden_states(pictures, self.config.depths, parallel)
        chosen = jnp.concatenate(states, axis=-1)[:, 1 if self.config.select == "default" else 0 :]
        with jax.named_scope("projector"):
            features = self.projector(chosen.astype(self.config.text.compute_dtype), parallel)
        return rearrange(features, "(b i) p d -> b (i p) d", b=len(pixels))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        pixels: Float[Array, "B I H W C"],
        index: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        reach: Reach | None = None,
        *,
        parallel: Parallel = _ONE_DEVICE,
    ) -> Float[Array, "B T D"]:
        """The final norm's output; `index` is `feature_index` of the tokens, in layout order as they are.

        `check_images` says on the host whether tokens and pictures fit; here, an image token too many becomes NaN.
        """
        features = Features(self.image_features(pixels, parallel), index)
        modality = jnp.zeros(tokens.shape, bool)
        return self.language.hidden(tokens, modality, positions, reach, features=features, parallel=parallel)


def check_images(tokens: Int[np.ndarray, "B T"], config: LlavaConfig, pictures: list[int]) -> None:
    """Raises ValueError where a row's image tokens are not P for each of its pictures."""
    for row, count in enumerate(pictures):
        found, wanted = int(np.sum(np.asarray(tokens)[row] == config.image_token)), count * config.features
        if found != wanted:
            raise ValueError(
                f"row {row} has {found} image tokens (id {config.image_token}) for {count} pictures of"
                f" {config.features} features; it must have {wanted}"
            )
