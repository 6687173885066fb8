"""The losses between a picture and its reconstruction, and the game with the discriminator.

    generator        reconstruction + perceptual + λ · adversarial + commitment
    adversarial      −mean D(fake)
    discriminator    (mean relu(1 − D(real)) + mean relu(1 + D(fake))) / 2
    λ                weight · |∂(reconstruction + perceptual)/∂W| / (|∂adversarial/∂W| + 10⁻⁶)

W is the kernel of the decoder's last convolution. Esser et al. 2021, arXiv:2012.09841, eq. 6-7; hinge losses: Lim & Ye
2017, arXiv:1705.02894.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

_LARGEST_WEIGHT = 1e4


def reconstruction_loss(
    fake: Float[Array, "B H W C"], real: Float[Array, "B H W C"], kind: Literal["l1", "l2"]
) -> Float[Array, ""]:
    """Mean absolute or squared difference."""
    difference = fake - real
    return jnp.mean(jnp.abs(difference) if kind == "l1" else difference**2)


def generator_hinge(fake_scores: Float[Array, "B h w"]) -> Float[Array, ""]:
    """What the decoder wants to be small."""
    return -jnp.mean(fake_scores)


def discriminator_hinge(real_scores: Float[Array, "B h w"], fake_scores: Float[Array, "B h w"]) -> Float[Array, ""]:
    """What the discriminator wants to be small: 1 where it cannot tell, 0 where it is sure and right."""
    return (jnp.mean(jax.nn.relu(1 - real_scores)) + jnp.mean(jax.nn.relu(1 + fake_scores))) / 2


def adaptive_weight(
    features: Float[Array, "B H W E"],
    kernel: Float[Array, "3 3 E C"],
    loss_gradient: Float[Array, "B H W C"],
    adversarial_gradient: Float[Array, "B H W C"],
) -> Float[Array, ""]:
    """λ / weight, from what both losses send back to the pixels that the last convolution makes of `features`.

    The convolution is linear, so its kernel's gradients follow without going through the decoder again.
    """

    def last_layer(kernel):
        return jax.lax.conv_general_dilated(
            features, kernel.astype(features.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    _, back = jax.vjp(last_layer, kernel)
    norms = [optax.tree.norm(back(g.astype(features.dtype))) for g in (loss_gradient, adversarial_gradient)]
    return jnp.clip(norms[0] / (norms[1] + 1e-6), 0, _LARGEST_WEIGHT)
