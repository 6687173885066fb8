"""The training loop: stages one after the other, each step logged, saved when it is time, stopped when it must be.

    for each stage:  mesh, compiled step, state (new, restored, or from the stage before)
        for each step:   batch -> state, metrics -> metrics.jsonl, display, checkpoint, evaluation
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ringjax import accelerator
from ringjax.training import agreement, distributed
from ringjax.training.arrays import CheckpointError, check_same_arrays, describe_arrays, load_arrays
from ringjax.training.begin import Begun, begin_from, check_same_base
from ringjax.training.checkpoint import FOLDER, CheckpointStore, last_whole, step_folders
from ringjax.training.config import RunConfig
from ringjax.training.image_tokenizer.config import TokenizerRun
from ringjax.training.load import to_yaml
from ringjax.training.manifest import NAME
from ringjax.training.mesh import make_mesh, simulate_devices
from ringjax.training.metrics import MetricsWriter, missing_steps
from ringjax.training.out_of_memory import explained
from ringjax.training.peers import Watch, is_agreed
from ringjax.training.plot import plot_loss
from ringjax.training.progress import Quiet, format_count, make_display
from ringjax.training.stage import StageLoop
from ringjax.training.start import OpenStart
from ringjax.training.stops import BadLoss, StopSignals
from ringjax.training.task import Task, Trains, TrainState, count_parameters
from ringjax.training.tasks import check_tasks, make_tasks
from ringjax.training.yaml_tree import ConfigError


def train(config: RunConfig | TokenizerRun, open_start: OpenStart | None = None) -> Path:
    """Train `config`, from its last checkpoint if there is one, and return the run's folder.

    `open_start` (`ringjax.interop.start`) reads a published model, where `init_from` names one.
    Raises ConfigError before anything runs, Preempted after a signal (saved), BadLoss for NaN and spikes, OutOfMemory,
    and CheckpointError when a checkpoint cannot be written or is of another model. Where another process is lost, this
    one ends with exit code 69 (`ringjax.training.peers`).
    """
    simulate_devices(max(stage.mesh.simulated_devices for stage in config.stage_list))
    distributed.start(config.distributed)
    with Watch(config.distributed):
        return _train(config, open_start)


def _train(config: RunConfig | TokenizerRun, open_start: OpenStart | None) -> Path:
    agreement.require_same("versions and config", lambda: agreement.software() | agreement.settings(config))
    agreement.require_same("devices", agreement.devices)
    tasks = make_tasks(config)
    agreement.require_same("data", lambda: _checked(config, tasks, open_start))
    with Run(config, tasks, open_start) as run, StopSignals() as signals, _debug(config):
        run.begin()
        for index in range(run.first_stage, len(config.stage_list)):
            run.stage(index, signals)
        run.finish()
    return run.folder


def _checked(
    config: RunConfig | TokenizerRun, tasks: Sequence[Task], open_start: OpenStart | None
) -> dict[str, str]:
    """Everything that can be found wrong before a run begins; gives what must be the same on all processes."""
    check_tasks(tasks, lambda task: task.check_devices(len(jax.devices())))
    check_tasks(tasks, lambda task: make_mesh(task.mesh_shape))
    check_tasks(tasks, lambda task: task.check_data())
    _check_notes(tasks)
    _check_init_from(config)
    if jax.process_count() == 1:
        return {}
    found: dict[str, str] = {}
    for task in tasks:
        found |= {f"{task.stage.name}: {name}": value for name, value in task.data_facts().items()}
    path = config.init_from
    start = None if path is None or not Path(path).exists() else tasks[0].open_start(path, open_start)
    return found if start is None else found | {f"init_from {path}": start.fingerprint}


def _check_notes(tasks: Sequence[Task]) -> None:
    """That each stage can go on from the one before it, found at the start and not after a week."""
    notes: dict[str, Any] = {}

    def check(task: Task) -> None:
        nonlocal notes
        notes = task.noted(notes, "a stage before it")

    check_tasks(tasks, check)


def _check_init_from(config: RunConfig | TokenizerRun) -> None:
    """That what the run begins with is there, before its folder is made; one that goes on does without."""
    path = config.init_from
    goes_on = (Path(config.run_dir) / FOLDER).is_dir()
    if path is not None and not goes_on and not Path(path).exists():
        raise ConfigError(
            f"init_from: {path} does not exist; give a run's folder, a .gguf file, a Hugging Face folder or an LWM"
            " stream (hubs are not asked)"
        )


@contextlib.contextmanager
def _debug(config: RunConfig):
    try:
        with jax.debug_nans(any(stage.training.debug_nans for stage in config.stage_list)):
            yield
    except FloatingPointError as error:
        raise BadLoss(f"training.debug_nans: {str(error).splitlines()[0]} (--debug shows where)") from error
    except RecursionError as error:
        # jax 0.12 loses itself when it looks for the place of a NaN inside a scanned, differentiated program.
        raise BadLoss("training.debug_nans: a nan was encountered, and this JAX cannot say where") from error


class Run(contextlib.AbstractContextManager):
    """A run and its files; a stage at a time."""

    def __init__(
        self, config: RunConfig | TokenizerRun, tasks: Sequence[Task], open_start: OpenStart | None = None
    ):
        self.config, self.tasks, self._open_start = config, tasks, open_start
        self.folder = Path(config.run_dir)
        self.is_main = distributed.is_main()
        logging = config.logging
        self.display: Quiet = make_display(logging.progress, logging.every, self.is_main, tasks[0].describe)
        self.store = CheckpointStore(self.folder, config.checkpoint, self.display.say, self._starts()[1:])
        self.writer: MetricsWriter | None = None
        self.state: TrainState | None = None
        self.base: dict[str, str] | None = None
        self.resumed: tuple[Path, dict[str, Any]] | None = None
        self.first_stage = 0
        self.notes: dict[str, Any] = {}

    def __exit__(self, kind, error, trace):
        try:
            # Whatever ended the run, a save that has begun is worth its end, where the other processes take part in it.
            if jax.process_count() == 1 or error is None or is_agreed(error):
                self.store.wait()
        except CheckpointError as second:
            self.display.say(str(second))
        self.display.close()
        if self.writer is not None:
            self.writer.close()

    # ------------------------------------------------------------------ begin and end

    def begin(self) -> None:
        """Find where to go on, and open the files."""
        found = distributed.same_on_all(self._find)
        if found is not None:
            self.resumed = Path(found[0]), found[1]
        step = self.resumed[1]["step"] if self.resumed else 0
        self.first_stage = self._stage_of(step)
        if self.is_main:
            _write(self.folder / "config.yaml", to_yaml(self.config).encode())
            for name, content in self.tasks[-1].files().items():
                _write(self.folder / name, content)
            self.writer = MetricsWriter(self.folder, step, self.config.logging.tensorboard)
            if lost := missing_steps(self.writer.history, step):
                path = self.folder / "metrics.jsonl"
                self.display.say(f"{path} lacks {len(lost)} of {step} steps (the first: {lost[0]}); somebody cut it")
        devices = jax.devices()
        self.display.say(f"{self.folder}: {len(devices)} × {devices[0].device_kind}, {jax.process_count()} process(es)")
        if devices[0].platform == "gpu":
            self.display.say(", ".join(accelerator.said()))
        if self.resumed:
            self.display.say(f"going on after step {step} ({self.resumed[0]})")

    def _find(self) -> list | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = last_whole(self.store.folder, self.config.checkpoint.verify, self.display.say)
        damaged = [path for _, path in step_folders(self.store.folder) if (path / NAME).exists()]
        if found is None and damaged:
            raise CheckpointError(
                f"no checkpoint of {self.store.folder} is whole, and {len(damaged)} were: bring back one of them from a"
                " copy, or use another run_dir to begin anew"
            )
        self.store.tidy()
        return None if found is None else [str(found[0]), found[1]]

    def _starts(self) -> list[int]:
        """The first step of each stage, and the step after the last."""
        starts = [0]
        for stage in self.config.stage_list:
            starts.append(starts[-1] + stage.training.steps)
        return starts

    def _stage_of(self, step: int) -> int:
        """The stage in which the step after `step` lies; beyond the last when all is done."""
        return sum(step >= end for end in self._starts()[1:])

    def finish(self) -> None:
        """Wait for the last save, draw the loss, and say where everything lies."""
        self.store.wait()
        if not self.is_main:
            return
        self.display.say(f"done after step {self._starts()[-1]}: {self.folder}/metrics.jsonl, {self.store.folder}")
        if self.config.logging.plot:
            task = self.tasks[0]
            path = plot_loss(self.folder, lines=task.plot_lines, label=task.plot_label)
            self.display.say(f"loss: {path}")

    # ------------------------------------------------------------------ one stage

    def stage(self, index: int, signals: StopSignals) -> None:
        """Train one stage to its end."""
        task, start = self.tasks[index], self._starts()[index]
        mesh = make_mesh(task.mesh_shape)
        trainer = task.trainer(mesh, self.config.seed, start)
        with explained(task.stage, trainer.abstract):
            self._train(index, mesh, trainer, signals)

    def _train(self, index: int, mesh: Mesh, trainer: Trains, signals: StopSignals) -> None:
        task, start = self.tasks[index], self._starts()[index]
        info = self.resumed[1] if self.resumed and self.resumed[1]["step"] > start else None
        done = info["step"] if info else start
        self.state = self._enter(trainer, task, start)
        self._announce(task, mesh, trainer)
        with task.feed(mesh, self.config.seed + index, info and info["loader"], self.display.say) as feed:
            self.display.start_stage(task.stage.name, done - start, task.stage.training.steps)
            owed = bool(info) and info.get("evaluation_owed", False)
            StageLoop(self, index, task, start, trainer, feed, info["losses"] if info else []).run(done, signals, owed)

    def _enter(self, trainer: Trains, task: Task, start: int) -> TrainState:
        """The state at the beginning of a stage: restored, carried over from the stage before, or new."""
        if self.resumed is None:
            if self.state is None:
                return self._first_state(trainer, task)
            self.notes = task.noted(self.notes, "the stage before")
            return self._carry(trainer, task, self.state)
        (path, info), self.resumed = self.resumed, None
        self.notes = task.noted(info.get("notes", {}), str(path))
        abstract = trainer.abstract
        check_same_arrays(info["parameters"], describe_arrays(abstract.params), str(path))
        params, frozen = load_arrays(path, "params", abstract.params), self._frozen(trainer, task, info)
        step = jax.device_put(jnp.int32(info["step"]), abstract.step.sharding)
        if info["step"] == start and not task.stage.optimizer.carry:
            return TrainState(step, params, trainer.fresh_optimizer(params), frozen)
        check_same_arrays(info["optimizer"], describe_arrays(abstract.optimizer), str(path), "optimizer")
        return TrainState(step, params, load_arrays(path, "optimizer", abstract.optimizer), frozen)

    def _first_state(self, trainer: Trains, task: Task) -> TrainState:
        self.notes = task.noted({}, "")
        if self.config.init_from is None:
            return trainer.init(self.config.seed)
        begun = self._begin_from(trainer, task)
        self.notes = task.noted(begun.notes, f"init_from {begun.identity['path']}")
        for line in begun.said:
            self.display.say(line)
        return task.first_state(trainer, begun.params, self.config.seed)

    def _frozen(self, trainer: Trains, task: Task, info: dict[str, Any]) -> Any:
        """What a checkpoint does not hold, read again from where the run began; None for most runs."""
        if trainer.abstract.frozen is None:
            return None
        begun = self._begin_from(trainer, task)
        check_same_base(info["base"], begun.identity)
        return task.first_state(trainer, begun.params, self.config.seed).frozen

    def _begin_from(self, trainer: Trains, task: Task) -> Begun:
        begun = begin_from(self.config, task, trainer, make_mesh(task.mesh_shape), self._open_start)
        if trainer.abstract.frozen is not None:
            self.base = begun.identity
        return begun

    def _carry(self, trainer: Trains, task: Task, state: TrainState) -> TrainState:
        places = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract)
        params = jax.device_put(state.params, places.params)
        carry = task.stage.optimizer.carry
        moments = jax.device_put(state.optimizer, places.optimizer) if carry else trainer.fresh_optimizer(params)
        frozen = jax.device_put(state.frozen, places.frozen)
        return TrainState(jax.device_put(state.step, places.step), params, moments, frozen)

    def _announce(self, task: Task, mesh, trainer: Trains) -> None:
        count = format_count(count_parameters(trainer.abstract.params))
        shape = " ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        if trainer.abstract.frozen is not None:
            count = f"{count} of {format_count(count_parameters((trainer.abstract.params, trainer.abstract.frozen)))}"
        self.display.say(f"stage {task.stage.name}: {count} parameters, {task.amount()}, mesh {shape}")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
