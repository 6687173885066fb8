"""A small any-to-any model, meshes for it, and its logits without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from ringjax.models import ModelConfig, Parallel, Transformer

LONGEST = 64


@functools.cache
def small_model(**changes) -> Transformer:
    sizes = dict(width=32, ffn_width=48, layers=2, heads=4, kv_heads=2, vocab_size=40, vision_vocab_size=24)
    # Large weights: sampled tokens then depend on every part of the model.
    config = ModelConfig(**{**sizes, "vision_codes": 20, "dtype": "float32", "init_std": 0.3, **changes})
    return Transformer(config, nnx.Rngs(0))


def parallel(shape: tuple[int, int, int, int], layout: str = "striped") -> Parallel:
    count = int(np.prod(shape))
    mesh = Mesh(
        np.array(jax.devices()[:count]).reshape(shape), ("dp", "fsdp", "tp", "sp"), axis_types=(AxisType.Auto,) * 4
    )
    return Parallel(mesh, layout)


@functools.cache
def logits_at(model, vision: bool, marks: bool = False):
    """Of the token after an index. Compiled once for a fixed length: what comes after the index is not seen from it.

    Of vision only the codes, unless `marks` asks for all ids.
    """

    @jax.jit
    def function(tokens, modality, index):
        hidden = model.hidden(tokens, modality, jnp.arange(LONGEST, dtype=jnp.int32)[None])[:, index]
        if not vision:
            return model.text_logits(hidden)
        return model.vision_logits(hidden)[:, : None if marks else model.config.vision_codes]

    return function
