"""Held-out loss of each data source, on the same batches every time."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.loader import make_loader
from ringjax.training.config import StageConfig
from ringjax.training.feed import Feed
from ringjax.training.step import Trainer, loss_metrics, readable


class Evaluator:
    """Called with parameters, it streams the first batches of each source's held-out part through the model."""

    def __init__(self, stage: StageConfig, trainer: Trainer, feed: Feed, seed: int):
        self._stage, self._trainer, self._feed, self._seed = stage, trainer, feed, seed

    def __call__(self, params: Any) -> dict[str, dict[str, float | None]]:
        """Source -> {"loss", "text_loss", "vision_loss"}, a modality without tokens being None."""
        return {name: self._source(source, params) for name, source in held_out_sources(self._stage.data).items()}

    def _source(self, source: SourceConfig, params: Any) -> dict[str, float | None]:
        total = None
        loader = self._loader(source)
        for rows in itertools.islice(loader, self._stage.training.eval_batches):
            sums = jax.device_get(self._trainer.evaluate(params, self._feed.place(rows)))
            sums = jax.tree.map(lambda x: np.sum(x, dtype=np.float64), sums)
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        loader.close()
        return {} if total is None else readable({name: float(x) for name, x in loss_metrics(total).items()})

    def _loader(self, source: SourceConfig):
        training, (index, count) = self._stage.training, self._feed.group
        return make_loader(
            dataclasses.replace(self._stage.data, heldout=(dataclasses.replace(source, weight=None),)),
            seq_len=training.seq_len,
            batch_size=training.batch_size,
            layout=self._stage.mesh.layout,
            ring_size=self._feed.mesh.shape["sp"],
            seed=self._seed,
            process_index=index,
            process_count=count,
            split="heldout",
        )


def held_out_sources(data: DataConfig) -> dict[str, SourceConfig]:
    """The sources to evaluate on by the name they have in metrics; those of a sample are its held-out part."""
    sources = data.heldout or tuple(source for source in data.sources if source.path.startswith("sample:"))
    return {source.path: source for source in sources}

