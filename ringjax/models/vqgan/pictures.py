"""Between uint8 pictures and pixels in [−1, 1], and whole data sets through a VQGAN."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from ringjax.models.vqgan.model import VQGAN


def to_pixels(pictures: UInt8[np.ndarray, "B H W *C"], resolution: int) -> Float[np.ndarray, "B R R C"]:
    """0…255 to −1…1, centred on a black square of the given resolution; a grey picture gets a channel.

    Raises:
        ValueError: not uint8, not `[B, H, W]` or `[B, H, W, C]`, or larger than the square: resize it first.
    """
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4):
        raise ValueError(f"pictures are {pictures.dtype} of shape {pictures.shape}; give uint8 [B,H,W] or [B,H,W,C]")
    height, width = pictures.shape[1:3]
    if max(height, width) > resolution:
        raise ValueError(f"pictures of {height} × {width} are larger than resolution {resolution}; resize them first")
    if pictures.ndim == 3:
        pictures = pictures[..., None]
    top, left = (resolution - height) // 2, (resolution - width) // 2
    square = np.zeros((len(pictures), resolution, resolution, pictures.shape[-1]), np.uint8)
    square[:, top : top + height, left : left + width] = pictures
    return square.astype(np.float32) / 127.5 - 1


def to_uint8(pixels: Float[Array, "B R R C"], size: int | None = None) -> UInt8[np.ndarray, "B H W *C"]:
    """−1…1 to 0…255, rounded; the centre of `size` × `size` where that is given; one channel is dropped."""
    pixels = np.asarray(pixels, np.float32)
    size = pixels.shape[1] if size is None else size
    start = (pixels.shape[1] - size) // 2
    centre = pixels[:, start : start + size, start : start + size]
    pictures = np.clip(np.round((centre + 1) * 127.5), 0, 255).astype(np.uint8)
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures


def encode_pictures(
    model: VQGAN, pictures: UInt8[np.ndarray, "n H W *C"], *, batch_size: int = 250
) -> Int[np.ndarray, "n h w"]:
    """The codes of any number of pictures, compiled once for `batch_size`."""
    return _in_batches(partial(_encode, *nnx.split(model)), to_pixels(pictures, model.config.resolution), batch_size)


def decode_pictures(
    model: VQGAN, codes: Int[np.ndarray, "n h w"], *, size: int | None = None, batch_size: int = 250
) -> UInt8[np.ndarray, "n H W *C"]:
    """The pictures of any number of codes, compiled once for `batch_size`; `size` as in `to_uint8`.

    Raises:
        ValueError: a code is not in the codebook.
    """
    codes = np.asarray(codes)
    if codes.size and not 0 <= codes.min() <= codes.max() < model.config.codes:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} are not all in 0 … {model.config.codes - 1}")
    return to_uint8(_in_batches(partial(_decode, *nnx.split(model)), codes, batch_size), size)


def _in_batches(function, items: np.ndarray, batch_size: int) -> np.ndarray:
    """Apply a compiled function to slices of one shape; the last one is filled up with its first item."""
    results = []
    batch_size = min(batch_size, max(len(items), 1))
    for start in range(0, max(len(items), 1), batch_size):
        batch = items[start : start + batch_size]
        filled = np.zeros((batch_size, *items.shape[1:]), items.dtype)
        filled[: len(batch)] = batch
        results.append(np.asarray(function(filled))[: len(batch)])
    return np.concatenate(results)


@partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state: nnx.State, pixels: Array) -> Array:
    return nnx.merge(graph, state).encode(pixels)


@partial(jax.jit, static_argnums=0)
def _decode(graph: nnx.GraphDef, state: nnx.State, codes: Array) -> Array:
    return nnx.merge(graph, state).decode(jnp.asarray(codes))
