"""Pictures varied on the device: mirrored, moved, made smaller or larger, on the background."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def augment(
    key: PRNGKeyArray,
    pixels: Float[Array, "B H W C"],
    background: Float[Array, "C"],
    *,
    flip: bool,
    shift: int,
    scale: float,
) -> Float[Array, "B H W C"]:
    """Each picture mirrored or not, scaled by 1 ± `scale` around its middle, and moved by up to `shift` whole pixels.

    What comes in from outside is `background`. Without any of the three the pictures are as they were.
    """
    flip_key, scale_key, shift_key = jax.random.split(key, 3)
    count, size = pixels.shape[0], pixels.shape[1]
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
        pixels = jnp.where(mirrored, pixels[:, :, ::-1], pixels)
    if not (shift or scale):
        return pixels
    factors = 1 + scale * jax.random.uniform(scale_key, (count,), minval=-1.0, maxval=1.0)
    moves = jax.random.randint(shift_key, (count, 2), -shift, shift + 1).astype(jnp.float32)
    centred = (1 - factors[:, None]) * size / 2 + moves

    def move(picture, factor, translation):
        return jax.image.scale_and_translate(
            picture, picture.shape, (0, 1), jnp.stack([factor, factor]), translation, "cubic", precision="highest"
        )

    # Outside of a picture resampling finds 0, so 0 has to be the background.
    moved = jax.vmap(move)(pixels - background, factors, centred)
    return jnp.clip(moved + background, -1, 1)
