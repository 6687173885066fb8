"""The loss of a trained run on the held-out prose of the samples, and a bigram model's on the same tokens."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from ringjax.data import samples
from ringjax.data.config import SourceConfig
from ringjax.data.loader import make_loader
from ringjax.data.sources import open_sources
from ringjax.evaluation.bigram import bigram_loss
from ringjax.inference.trained import TrainedRun
from ringjax.training.step import batch_loss

PROSE = (SourceConfig("sample:prose"),)
_ROWS = 32


class ProseLoss(NamedTuple):
    """Nats a token on held-out prose."""

    model: float
    bigram: float
    tokens: int


def prose_loss(run: TrainedRun, *, seq_len: int, max_tokens: int | None = None) -> ProseLoss:
    """The run's loss over the held-out chapters in rows of `seq_len` (all, or the first `max_tokens` tokens)."""
    data = dataclasses.replace(run.data, sources=PROSE, heldout=PROSE, weights="token", prefetch=0)
    graph, params = nnx.split(run.model)
    config = run.model.config

    @jax.jit
    def sums(params, batch):
        return batch_loss(nnx.merge(graph, params), batch, run.parallel, config.loss_chunk)

    total = weight = 0.0
    for batch in make_loader(data, seq_len=seq_len, batch_size=_ROWS, split="heldout"):
        found = jax.device_get(sums(params, batch))
        total, weight = total + float(found.text_loss_sum), weight + float(found.text_weight)
        if max_tokens is not None and weight >= max_tokens:
            break
    train, heldout = (_documents(data, split) for split in ("train", "heldout"))
    return ProseLoss(total / weight, bigram_loss(train, heldout, run.tokenizer.vocab_size), int(weight))


def _documents(data, split: samples.Split) -> list[Int[np.ndarray, " n"]]:
    (source,), _ = open_sources(data, split)
    return [source.read(index).tokens for index in range(len(source))]
