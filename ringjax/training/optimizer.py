"""AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) from optax, and the learning rate over the steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ringjax.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: Int[Array, ""] | int, steps: int) -> Float[Array, ""]:
    """The rate of step 0, 1, …, steps − 1: linear warm-up, then constant or half a cosine.

        warm-up   rate · (step + 1) / warmup_steps
        cosine    least + (rate − least) · (1 + cos(π · progress)) / 2

    The first step has a rate above 0, so that no batch is thrown away.
    """
    step = jnp.asarray(step, jnp.float32)
    warm = config.learning_rate * (step + 1) / max(1, config.warmup_steps)
    if config.schedule == "constant":
        after = jnp.float32(config.learning_rate)
    else:
        progress = jnp.clip((step - config.warmup_steps) / max(1, steps - config.warmup_steps), 0, 1)
        span = config.learning_rate - config.min_learning_rate
        after = config.min_learning_rate + span * (1 + jnp.cos(jnp.pi * progress)) / 2
    return jnp.where(step < config.warmup_steps, warm, after)


def decays(path: tuple, leaf: Any) -> bool:
    """Whether weight decay pulls on a parameter: on matrices and tables, not on norms, biases and image codes."""
    name = jax.tree_util.keystr(path, simple=True, separator=".").lower()
    return not any(word in name for word in ("norm", "ln_f", "bias", "codebook"))


def is_vision(path: tuple) -> bool:
    """Whether a parameter is a table of pictures."""
    return not {"vte", "vision_head"}.isdisjoint(jax.tree_util.keystr(path, simple=True, separator=".").split("."))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip, Adam and weight decay, all but the learning rate: `update` gives the direction to go along.

        direction = (m̂ / (√v̂ + ε) + decay · w) · share          w ← w − rate · direction

    The share is `vision_rate` for the tables of pictures, 1 for the rest.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def mask(params):
        return jax.tree_util.tree_map_with_path(decays, params)

    def share(updates, params):
        scaled = lambda path, u: u * config.vision_rate if is_vision(path) else u  # noqa: E731
        return jax.tree_util.tree_map_with_path(scaled, updates)

    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        *([] if config.vision_rate == 1 else [optax.stateless(share)]),
    )
