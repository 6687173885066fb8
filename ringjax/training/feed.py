"""Batches for a stage, each with the loader state to save once it has been trained on."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ringjax.data.loader import make_loader, merge_states
from ringjax.data.sources import codes_of, open_sources
from ringjax.data.tokenizers import load_tokenizer
from ringjax.training.config import RunConfig, StageConfig
from ringjax.training.distributed import gather_json, place_batch, row_group
from ringjax.training.task import DataEnded, Fed
from ringjax.training.yaml_tree import ConfigError


class Feed:
    """Reads one batch ahead, so that the host packs the next one while the devices work on this one."""

    def __init__(self, stage: StageConfig, mesh: Mesh, seed: int, state: dict[str, Any] | None = None):
        """`state`: what `whole_state` returned when the checkpoint was made, None for the beginning."""
        training = stage.training
        self.mesh, self._accumulation = mesh, training.accumulation
        self.group = row_group(mesh, training.batch_size // training.accumulation)
        index, count = self.group
        self._loader = make_loader(
            stage.data,
            seq_len=training.seq_len,
            batch_size=training.batch_size,
            layout=stage.mesh.layout,
            ring_size=mesh.shape["sp"],
            seed=seed,
            process_index=index,
            process_count=count,
        )
        if state is not None:
            self._loader.set_state(state)
        self._ahead: Fed | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """How many lines of the data were left out so far, by reason."""
        return dict(self._loader.skipped)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._loader.close()

    def next(self) -> Fed:
        """The next batch; raises DataEnded after the last one."""
        self.prepare()
        fed, self._ahead = self._ahead, None
        if fed is None:
            raise DataEnded("the data has ended; raise data.epochs (null: without end) or lower training.steps")
        return fed

    def prepare(self) -> None:
        """Read the batch after the one just given; call while the devices are busy."""
        if self._ahead is None:
            rows = next(self._loader, None)
            self._ahead = None if rows is None else Fed(rows, self._loader.get_state())

    def place(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows of this process as global arrays `[micro-batches, rows, T]`."""
        return place_batch(rows, self.mesh, self._accumulation, self.group)

    def whole_state(self, fed: Fed) -> dict[str, Any]:
        """The place after `fed` for any number of processes: the states of all of them, merged."""
        by_group = dict(gather_json([self.group[0], fed.loader_state]))
        return merge_states(list(by_group.values()))


def check_data(config: RunConfig) -> None:
    """Open the data of every stage once, so that a missing file stops a run at its start and not after a week.

    Raises ConfigError with one line for each stage whose data cannot be used.
    """
    problems = []
    for stage in config.stage_list:
        try:
            check_stage_data(stage)
        except (ValueError, OSError, ImportError) as error:
            problems.append(f"stage {stage.name!r}: {error}" if config.stages else str(error))
    if problems:
        raise ConfigError(problems)


def check_stage_data(stage: StageConfig) -> None:
    """`check_data` of one stage; raises ValueError, OSError or ImportError."""
    size = load_tokenizer(stage.data.tokenizer).vocab_size
    if size > stage.model.vocab_size:
        raise ValueError(
            f"tokenizer {stage.data.tokenizer!r} has {size} ids and model.vocab_size is {stage.model.vocab_size};"
            f" set it to {size} or more"
        )
    sources, _ = open_sources(stage.data, "train")
    if stage.training.eval_every:
        held_out, _ = open_sources(stage.data, "heldout")
        codes_of([*sources, *held_out], stage.data)
