"""How well a picture is kept: PSNR and SSIM, of uint8 pictures as a person would save them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SIGMA, RADIUS = 1.5, 5  # the window is cut at 3.5 σ, 11 × 11
K1, K2, RANGE = 0.01, 0.03, 255.0


def psnr(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """10 · log10(255² / mean squared difference), in dB, of pictures in 0 … 255; 99 where they are equal."""
    error = jnp.mean((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2, axis=(1, 2, 3))
    return jnp.where(error > 0, 10 * jnp.log10(RANGE**2 / jnp.maximum(error, 1e-12)), 99.0)


def ssim(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """Mean structural similarity of pictures in 0 … 255, over channels and all windows that lie inside.

        ((2 μa μb + c1)(2 σab + c2)) / ((μa² + μb² + c1)(σa² + σb² + c2))

    Gaussian windows as in Wang et al. 2004 and scikit-image's `structural_similarity(gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False)`. Raises ValueError for pictures smaller than a window.
    """
    if min(a.shape[1:3]) < 2 * RADIUS + 1:
        raise ValueError(f"pictures of {a.shape[1]} × {a.shape[2]} are smaller than SSIM's window of {2 * RADIUS + 1}")
    # Around mid-grey: float32 keeps the variances, which are differences of squares, to more digits.
    a, b = a.astype(jnp.float32) - RANGE / 2, b.astype(jnp.float32) - RANGE / 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + RANGE / 2, mean_b + RANGE / 2
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return jnp.mean(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)), axis=(1, 2, 3))


def gaussian() -> np.ndarray:
    """The window along one axis."""
    window = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    return window / window.sum()


def _blur(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    # Sums of shifted pictures, not a convolution: accelerators round the inputs of those to a few bits.
    for axis in (1, 2):
        length = x.shape[axis] - 2 * RADIUS
        parts = [jnp.take(x, jnp.arange(i, i + length), axis=axis) * w for i, w in enumerate(gaussian())]
        x = sum(parts)
    return x
