"""Batches for a stage, each with the loader state to save once it has been trained on."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ringjax.data.loader import make_loader
from ringjax.training.config import StageConfig
from ringjax.training.distributed import gather_json, place_batch, row_group


class Fed(NamedTuple):
    """A batch of this process's rows, and the loader's state after it."""

    rows: dict[str, np.ndarray]
    loader_state: Any


class Feed:
    """Reads one batch ahead, so that the host packs the next one while the devices work on this one."""

    def __init__(self, stage: StageConfig, mesh: Mesh, seed: int, states: list[Any] | None = None):
        """`states`: what `gather_states` returned when the checkpoint was made, None for the beginning."""
        training = stage.training
        self._mesh, self._accumulation = mesh, training.accumulation
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
        if states is not None:
            if len(states) != count:
                raise ValueError(
                    f"the checkpoint was made with {len(states)} groups of rows and this mesh has {count}: the order of"
                    " the data would change; use as many processes along dp and fsdp as before"
                )
            self._loader.set_state(states[index])
        self._iterator = iter(self._loader)
        self._ahead: Fed | None = None

    def next(self) -> Fed:
        """The next batch."""
        fed, self._ahead = self._ahead or self._read(), None
        return fed

    def prepare(self) -> None:
        """Read the batch after the one just given; call while the devices are busy."""
        self._ahead = self._ahead or self._read()

    def _read(self) -> Fed:
        return Fed(next(self._iterator), self._loader.get_state())

    def place(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows of this process as global arrays `[micro-batches, rows, T]`."""
        return place_batch(rows, self._mesh, self._accumulation, self.group)

    def gather_states(self, state: Any) -> list[Any]:
        """The loader state of every group of rows, in order, on every process."""
        by_group = dict(gather_json([self.group[0], state]))
        return [by_group[index] for index in range(self.group[1])]

