"""What the training loop asks of the thing it trains: one `Task` a stage, nothing of which knows of steps or files.

    TransformerTask       transformer_task.py      config with a section `model`
    ImageTokenizerTask    image_tokenizer/task.py  config with a section `vqgan`

The loop steps, logs, saves, resumes and stops; a task compiles, feeds, evaluates, and says what a line shows.
"""

import abc
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ringjax.models.lora import joined
from ringjax.training.mesh import is_simulated
from ringjax.training.start import OpenStart, Start, open_published

Metrics = dict[str, Float[Array, ""]]
Measured = dict[str, float | None]


class DataEnded(RuntimeError):
    """The data has a last batch (data.epochs) and it has been trained on."""


class Fed(NamedTuple):
    """A batch of this process's rows, and the loader's state after it."""

    rows: dict[str, np.ndarray]
    loader_state: Any


class TrainState(NamedTuple):
    """What a step changes. What is random in a step follows from the seed and the step, so there is no key."""

    step: Int[Array, ""]
    params: Any
    optimizer: Any
    frozen: Any = None
    """Parameters that steps use and do not change (those under adapters); None: there are none. Not in checkpoints."""

    @property
    def whole(self) -> Any:
        """All parameters of the model."""
        return self.params if self.frozen is None else joined(self.params, self.frozen)


class Trains(Protocol):
    """The compiled functions of a stage; `abstract` holds shapes, types and shardings of the whole state."""

    abstract: TrainState
    init: Callable[[int], TrainState]
    fresh_optimizer: Callable[[Any], Any]
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class Feeds(contextlib.AbstractContextManager, Protocol):
    """Batches of a stage, read one ahead."""

    skipped: dict[str, int]

    def next(self) -> Fed:
        """The next batch; raises DataEnded after the last one."""

    def prepare(self) -> None:
        """Read the batch after the one just given; called while the devices are busy."""

    def place(self, rows: dict[str, np.ndarray]) -> Any:
        """Rows of this process as global arrays."""

    def whole_state(self, fed: Fed) -> dict[str, Any]:
        """The place after `fed` for any number of processes."""


class Task(abc.ABC):
    """One stage of a run. `stage` has a name and the sections training, optimizer and mesh."""

    plot_lines: tuple[tuple[str, str, str], ...]
    """Key of the metrics, label and colour of each curve in loss.png."""
    plot_label: str
    """What the losses are measured in."""

    def __init__(self, stage: Any):
        self.stage = stage

    @property
    def mesh_shape(self) -> str:
        """The mesh string, which may be another one on simulated devices."""
        mesh = self.stage.mesh
        return mesh.simulated_shape if is_simulated() and mesh.simulated_shape else mesh.shape

    @abc.abstractmethod
    def check_devices(self, device_count: int) -> None:
        """Raises ValueError where the stage does not fit this many devices."""

    @abc.abstractmethod
    def check_data(self) -> None:
        """Raises ValueError, OSError or ImportError where the data cannot be used."""

    @abc.abstractmethod
    def data_facts(self) -> dict[str, str]:
        """Fingerprints of the data and of what reads it, by name: on all processes the same. Raises as `check_data`."""

    @abc.abstractmethod
    def trainer(self, mesh: Mesh, seed: int, start: int) -> Trains:
        """The compiled functions of this stage, which begins at step `start` of the run."""

    def base(self, trainer: Any) -> Any:
        """Shapes, types and places of the parameters that a run begins with."""
        return trainer.abstract.params

    def first_state(self, trainer: Any, params: Any, seed: int) -> TrainState:
        """The state before the first step, from such parameters."""
        zero = jax.device_put(np.int32(0), trainer.abstract.step.sharding)
        return TrainState(zero, params, trainer.fresh_optimizer(params))

    def files(self) -> dict[str, bytes]:
        """What the run's folder holds so that it can be used elsewhere: paths in it, and contents."""
        return {}

    def noted(self, before: dict[str, Any], where: str) -> dict[str, Any]:
        """What checkpoints of this stage say of the data beside the place in it, JSON-able.

        `before` is what was said at `where`, a checkpoint that this stage goes on from; raises ValueError where that
        cannot be.
        """
        return before

    def open_start(self, path: str, opener: OpenStart | None) -> Start | None:
        """The published model at `path`, if it is one."""
        return open_published(path, None, opener)

    def first_params(self, start: Start, mesh: Mesh, seed: int) -> tuple[Any, list[str]]:
        """The parameters from a published model, where they live, and lines worth saying."""
        raise NotImplementedError(f"init_from {start.path} is a language model; this run trains something else")

    @abc.abstractmethod
    def feed(self, mesh: Mesh, seed: int, state: dict[str, Any] | None, say: Callable[[str], None]) -> Feeds:
        """Batches from the beginning, or from the state that a checkpoint holds; `say`s what a person should know."""

    @abc.abstractmethod
    def evaluator(self, trainer: Any, feed: Any, seed: int) -> Callable[[Any], dict[str, Measured]]:
        """From parameters to source -> measurements on held-out data."""

    @abc.abstractmethod
    def amount(self) -> str:
        """What a step is trained on, in words: "8 × 1024 tokens a step"."""

    @abc.abstractmethod
    def readable(self, metrics: dict[str, float]) -> Measured:
        """The metrics of a step for people; must hold "loss" and "grad_norm"."""

    @abc.abstractmethod
    def speed(self, parameters: int, seconds: float, rows: dict[str, np.ndarray]) -> Measured:
        """What a step on a batch with these rows of this process, which took `seconds`, says of the speed."""

    @abc.abstractmethod
    def describe(self, record: dict[str, Any]) -> str:
        """The measurements of a step's record in words, for the display."""

    @abc.abstractmethod
    def describe_evaluation(self, results: dict[str, Measured]) -> str:
        """The results of an evaluation in words."""

    def finish(self, folder: Path, trainer: Any, feed: Any, params: Any) -> list[str]:
        """Write what a stage leaves beside its checkpoint, before its last one; returns lines worth saying.

        Every process calls it; only process 0 writes.
        """
        return []


def count_parameters(params: Any) -> int:
    """Numbers in all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
