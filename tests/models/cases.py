"""A small model, meshes and batches that the model tests share."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from ringjax.attention import Reach, layouts
from ringjax.models import ModelConfig, Parallel, Transformer

SMALL = ModelConfig(
    width=32, ffn_width=48, layers=2, heads=4, kv_heads=2, vocab_size=40, vision_vocab_size=16, vision_codes=12,
    dtype="float32", init_std=0.2, qkv_bias=True, loss_chunk=7,
)  # fmt: skip


def mesh(dp: int, fsdp: int, tp: int, sp: int) -> Mesh:
    """A mesh of simulated devices."""
    shape = (dp, fsdp, tp, sp)
    devices = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, ("dp", "fsdp", "tp", "sp"), axis_types=(AxisType.Auto,) * 4)


def batch(config: ModelConfig = SMALL, rows: int = 4, length: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows of text and vision, some padding at the end of row 0, in ascending order."""
    rng = np.random.default_rng(seed)
    shape = rows, length
    modality, target_modality = (rng.random(shape) < (0.4 if config.vision_vocab_size else 0) for _ in "12")
    begins = np.where(np.arange(length) < length // 3, 0, length // 3)
    positions = np.broadcast_to(np.arange(length) - begins, shape).astype(np.int32)
    weights = np.where(rng.random(shape) < 0.3, 0, rng.random(shape)).astype(np.float32)
    real = {
        "tokens": _ids(rng, config, modality),
        "modality": modality,
        "targets": _ids(rng, config, target_modality),
        "target_modality": target_modality,
        "loss_weights": weights,
        "positions": positions,
        "behind": positions,
        "ahead": np.zeros(shape, np.int32),
    }
    padding = (np.arange(rows)[:, None] == 0) & (np.arange(length) >= length - 3)
    blank = dict.fromkeys(real, 0) | {"behind": -1}
    return {name: np.where(padding, blank[name], x).astype(x.dtype) for name, x in real.items()}


def _ids(rng, config: ModelConfig, modality: np.ndarray) -> np.ndarray:
    text = rng.integers(0, config.vocab_size, modality.shape)
    vision = rng.integers(0, config.vision_codes + 2, modality.shape)
    return np.where(modality, vision, text).astype(np.int32)


def in_layout(batch: dict[str, np.ndarray], parallel: Parallel) -> dict[str, np.ndarray]:
    """The batch as the loader gives it."""
    order = layouts.get(parallel.layout)
    return {name: order.permute(x, parallel.ring_size, 1) for name, x in batch.items()}


def model(config: ModelConfig = SMALL, parallel: Parallel | None = None, seed: int = 0) -> Transformer:
    """A model with random parameters, norms and biases too."""
    graph, state = _parts(config, parallel or Parallel(), seed)
    return nnx.merge(graph, jax.tree.map(lambda x: x, state))  # a copy: a test may change its model


@functools.cache
def _parts(config: ModelConfig, parallel: Parallel, seed: int):
    graph, state = nnx.split(Transformer.create(config, seed, parallel))
    rng = np.random.default_rng(seed)

    def disturb(x):  # biases and norms begin as zeros and ones, which would hide a forgotten one
        noise = rng.standard_normal(x.shape).astype(x.dtype) * 0.1
        return jax.device_put(np.asarray(x) + noise, x.sharding)

    return graph, jax.tree.map(disturb, state)


def hidden(model: Transformer, batch, parallel: Parallel | None = None):
    """The model's hidden states of a batch."""
    reach = Reach(batch["behind"], batch["ahead"])
    tokens = batch["tokens"], batch["modality"], batch["positions"]
    return model.hidden(*tokens, reach, parallel=parallel or Parallel())


def changed(config: ModelConfig = SMALL, **changes) -> ModelConfig:
    """`config` with changes."""
    return dataclasses.replace(config, **changes)
