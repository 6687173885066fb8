"""The perceptual loss: how far two pictures are apart in the features of VGG16.

    distance = Σ_layers mean_pixels Σ_channels (f̂ − ĝ)²        f̂ = f / |f|  over the channels of each pixel

As LPIPS (Zhang et al. 2018, arXiv:1801.03924) without its learned weights of the channels. VGG16: Simonyan & Zisserman
2014, arXiv:1409.1556; scripts/perceptual_weights.py makes the file of its convolutions.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from ringjax.training.image_tokenizer.config import LAYERS

Features = dict[str, Array]
"""`conv1_1/kernel` [3, 3, in, out] and `conv1_1/bias` [out] of each convolution, float32 or the type of the run."""

WIDTHS = {"1": 64, "2": 128, "3": 256, "4": 512}
# Of the training pictures, blue, green, red: what is subtracted from pixels in 0 … 255.
MEANS = (104.007, 116.669, 122.679)


def needed(layers: Sequence[str]) -> tuple[str, ...]:
    """The convolutions up to the last of `layers`."""
    return LAYERS[: max(LAYERS.index(name) for name in layers) + 1]


def shapes(layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that these layers take."""
    found, width = {}, 3
    for name in needed(layers):
        wide = WIDTHS[name[4]]
        found[f"{name}/kernel"], found[f"{name}/bias"] = (3, 3, width, wide), (wide,)
        width = wide
    return found


def load_features(path: str | Path, layers: Sequence[str]) -> dict[str, np.ndarray]:
    """The weights in float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or tensors are missing or have another shape.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"losses.perceptual_weights {path} does not exist; make it with scripts/perceptual_weights.py, or set null"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            for name, shape in shapes(layers).items():
                found = tuple(file.get_slice(name).get_shape()) if name in names else None
                if found != shape:
                    raise ValueError(f"{path}: {name} is {found or 'missing'}, not {shape}; convert the weights again")
            return {name: file.get_tensor(name).astype(np.float32) for name in shapes(layers)}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({str(error)[:300]})") from None


def vgg_features(weights: Features, pixels: Float[Array, "B H W C"], layers: Sequence[str]) -> list[Array]:
    """The features of `layers` after their ReLU, of pictures in [−1, 1]; grey ones are taken as colour."""
    if pixels.shape[-1] == 1:
        pixels = jnp.repeat(pixels, 3, axis=-1)
    x = (pixels[..., ::-1] + 1) * 127.5 - jnp.asarray(MEANS)
    x = x.astype(weights["conv1_1/kernel"].dtype)
    found, block = {}, "1"
    for name in needed(layers):
        if name[4] != block:
            block, x = name[4], nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = jax.lax.conv_general_dilated(
            x, weights[f"{name}/kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = found[name] = jax.nn.relu(x + weights[f"{name}/bias"])
    return [found[name] for name in layers]


def perceptual_distance(
    weights: Features, a: Float[Array, "B H W C"], b: Float[Array, "B H W C"], layers: Sequence[str]
) -> Float[Array, ""]:
    """The mean distance of pictures `a` from pictures `b`."""
    with jax.named_scope("perceptual"):
        pairs = zip(vgg_features(weights, a, layers), vgg_features(weights, b, layers))
        return sum(jnp.mean(jnp.sum((_unit(f) - _unit(g)) ** 2, axis=-1)) for f, g in pairs)


def _unit(features: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
    features = features.astype(jnp.float32)
    # Inside the root: the gradient of a pixel without any feature (ReLU gives many) is 0, not NaN.
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + 1e-10)
