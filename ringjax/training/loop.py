"""The training loop: stages one after the other, each step logged, saved when it is time, stopped when it must be.

    for each stage:  mesh, compiled step, state (new, restored, or from the stage before)
        for each step:   batch -> state, metrics -> metrics.jsonl, display, checkpoint, evaluation
"""

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ringjax.models.parallel import Parallel
from ringjax.training import distributed
from ringjax.training.checkpoint import (
    FOLDER,
    CheckpointError,
    CheckpointStore,
    check_same_arrays,
    describe_arrays,
    last_whole,
    load_arrays,
)
from ringjax.training.config import RunConfig, StageConfig
from ringjax.training.evaluate import Evaluator
from ringjax.training.feed import DataEnded, Fed, Feed, check_data
from ringjax.training.load import check_devices, mesh_shape, to_plain, to_yaml
from ringjax.training.mesh import is_simulated, make_mesh, simulate_devices
from ringjax.training.metrics import MetricsWriter
from ringjax.training.plot import plot_loss
from ringjax.training.progress import Quiet, format_count, make_display
from ringjax.training.step import Trainer, TrainState, make_trainer
from ringjax.training.stops import BadLoss, LossGuard, Preempted, StopSignals, save_bad_batch
from ringjax.training.utilisation import flops_per_row, mfu


def train(config: RunConfig) -> Path:
    """Train `config`, from its last checkpoint if there is one, and return the run's folder.

    Raises ConfigError before anything runs, Preempted after a signal (saved), BadLoss for NaN and spikes, and
    CheckpointError when a checkpoint cannot be written or is of another model.
    """
    simulate_devices(max(stage.mesh.simulated_devices for stage in config.stage_list))
    distributed.start(config.distributed)
    check_devices(config, len(jax.devices()), is_simulated())
    check_data(config)
    with Run(config) as run, StopSignals() as signals, _debug(config):
        run.begin()
        for index in range(run.first_stage, len(config.stage_list)):
            run.stage(index, signals)
        run.finish()
    return run.folder


@contextlib.contextmanager
def _debug(config: RunConfig):
    with jax.debug_nans(any(stage.training.debug_nans for stage in config.stage_list)):
        yield


class Pending(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    fed: Fed
    metrics: dict[str, jax.Array]


class Run(contextlib.AbstractContextManager):
    """A run and its files; a stage at a time."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = Path(config.run_dir)
        self.is_main = distributed.is_main()
        self.display: Quiet = make_display(config.logging.progress, config.logging.every, self.is_main)
        self.store = CheckpointStore(self.folder, config.checkpoint, self.display.say)
        self.writer: MetricsWriter | None = None
        self.state: TrainState | None = None
        self.resumed: tuple[Path, dict[str, Any]] | None = None
        self.first_stage = 0

    def __exit__(self, *error):
        try:
            self.store.wait()  # whatever ended the run, a save that has begun is worth its end
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
            _write_text(self.folder / "config.yaml", to_yaml(self.config))
            self.writer = MetricsWriter(self.folder, step, self.config.logging.tensorboard)
        devices = jax.devices()
        self.display.say(f"{self.folder}: {len(devices)} × {devices[0].device_kind}, {jax.process_count()} process(es)")
        if self.resumed:
            self.display.say(f"going on after step {step} ({self.resumed[0]})")

    def _find(self) -> list | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = last_whole(self.store.folder, self.config.checkpoint.verify, self.display.say)
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
            self.display.say(f"loss: {plot_loss(self.folder)}")

    # ------------------------------------------------------------------ one stage

    def stage(self, index: int, signals: StopSignals) -> None:
        """Train one stage to its end."""
        stage, start = self.config.stage_list[index], self._starts()[index]
        mesh = make_mesh(mesh_shape(stage, is_simulated()))
        parallel = Parallel(mesh, stage.mesh.layout, stage.mesh.strategy, stage.mesh.backend)
        trainer = make_trainer(stage.model, stage.optimizer, parallel, steps=stage.training.steps, start=start)
        self.state, loader_state, done = self._enter(trainer, stage, start)
        self._announce(stage, mesh, trainer)
        with Feed(stage, mesh, self.config.seed + index, loader_state) as feed:
            self.display.start_stage(stage.name, done - start, stage.training.steps)
            StageLoop(self, index, stage, start, trainer, feed, mesh).run(done, signals)

    def _enter(self, trainer: Trainer, stage: StageConfig, start: int) -> tuple[TrainState, dict | None, int]:
        """The state at the beginning of a stage: restored, carried over from the stage before, or new."""
        if self.resumed is None:
            state = self.state
            if state is None:
                return self._first_state(trainer), None, start
            return self._carry(trainer, stage, state.step, state.params, state.optimizer), None, start
        (path, info), self.resumed = self.resumed, None
        abstract = trainer.abstract
        check_same_arrays(info["parameters"], describe_arrays(abstract.params), str(path))
        params = load_arrays(path, "params", abstract.params)
        step = jax.device_put(jax.numpy.int32(info["step"]), abstract.step.sharding)
        if info["step"] == start and not stage.optimizer.carry:
            return TrainState(step, params, trainer.fresh_optimizer(params)), None, start
        check_same_arrays(info["optimizer"], describe_arrays(abstract.optimizer), str(path), "optimizer")
        state = TrainState(step, params, load_arrays(path, "optimizer", abstract.optimizer))
        return state, None if info["step"] == start else info["loader"], info["step"]

    def _first_state(self, trainer: Trainer) -> TrainState:
        if self.config.init_from is None:
            return trainer.init(self.config.seed)
        found = distributed.same_on_all(self._find_first)
        if found is None:
            raise CheckpointError(f"init_from {self.config.init_from} holds no whole checkpoint; give another run's folder")
        abstract = trainer.abstract
        check_same_arrays(found[1], describe_arrays(abstract.params), found[0])
        params = load_arrays(Path(found[0]), "params", abstract.params)
        self.display.say(f"parameters from {found[0]}")
        zero = jax.device_put(jax.numpy.int32(0), abstract.step.sharding)
        return TrainState(zero, params, trainer.fresh_optimizer(params))

    def _find_first(self) -> list | None:
        found = last_whole(Path(self.config.init_from) / FOLDER, self.config.checkpoint.verify, self.display.say)
        return None if found is None else [str(found[0]), found[1]["parameters"]]

    def _carry(self, trainer: Trainer, stage: StageConfig, step, params, optimizer) -> TrainState:
        places = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract)
        params = jax.device_put(params, places.params)
        if not stage.optimizer.carry:
            return TrainState(jax.device_put(step, places.step), params, trainer.fresh_optimizer(params))
        return TrainState(jax.device_put(step, places.step), params, jax.device_put(optimizer, places.optimizer))

    def _announce(self, stage: StageConfig, mesh, trainer: Trainer) -> None:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.abstract.params))
        shape = " ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        self.display.say(
            f"stage {stage.name}: {format_count(count)} parameters, {stage.training.batch_size} × "
            f"{stage.training.seq_len} tokens a step, mesh {shape}, {stage.mesh.layout} {stage.mesh.strategy}"
        )


class StageLoop:
    """The steps of one stage."""

    def __init__(self, run: Run, index: int, stage: StageConfig, start: int, trainer: Trainer, feed: Feed, mesh):
        self.run_, self.index, self.stage, self.start = run, index, stage, start
        self.trainer, self.feed = trainer, feed
        self.end = start + stage.training.steps
        self.evaluator = Evaluator(stage, mesh, trainer, feed, run.config.seed)
        history = run.writer.history if run.writer else []
        self.guard = LossGuard(stage.training.spike, [record.get("loss") for record in history])
        self.pending: list[Pending] = []
        self.newest: Fed | None = None
        self.clock: float | None = None
        # Metrics are read one step late, so that the host prepares a step while the devices do the one before.
        # Simulated devices get no such lead: with few cores, programs that overlap wait for each other's threads.
        self.lag = 0 if is_simulated() else 1
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.abstract.params))
        model, training = stage.model, stage.training
        width = model.heads * model.head_size
        self.flops = training.batch_size * flops_per_row(parameters, model.layers, width, training.seq_len)

    def run(self, done: int, signals: StopSignals) -> None:
        """Steps `done` + 1 … of the stage; saves at the end."""
        training, every = self.stage.training, self.run_.config.checkpoint.every
        for step in range(done + 1, self.end + 1):
            fed = self._next(step)
            self.run_.state, metrics = self.trainer.step(self.run_.state, self.feed.place(fed.rows))
            self.pending.append(Pending(step, fed, metrics))
            self.newest = fed
            if step < self.end:
                self.feed.prepare()
            self.report(keep=self.lag)
            self.run_.store.poll()
            signal = signals.received(step)
            if step % every == 0 or step == self.end or signal:
                self.report(keep=0)  # a state is saved only after its loss was seen
                self.save(step, fed)
            if signal:
                self.run_.store.wait()
                raise Preempted(f"{signal} at step {step}: saved; the same command goes on from there")
            if training.eval_every and (step % training.eval_every == 0 or step == self.end):
                self.report(keep=0)
                self.evaluate(step)

    def _next(self, step: int) -> Fed:
        try:
            return self.feed.next()
        except DataEnded as error:
            if self.newest is not None:
                self.report(keep=0)
                self.save(step - 1, self.newest)
                self.run_.store.wait()
            raise DataEnded(f"after step {step - 1}: {error} (the state is saved)") from None

    def report(self, keep: int) -> None:
        """Read the metrics of all but the newest `keep` steps."""
        while len(self.pending) > keep:
            self.report_one(self.pending.pop(0))

    def report_one(self, pending: Pending) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        now = time.monotonic()
        seconds, self.clock = None if self.clock is None else now - self.clock, now
        if problem := self.guard.problem(metrics["loss"], metrics["grad_norm"]):
            path = save_bad_batch(self.run_.folder, pending.step, pending.fed.rows, pending.fed.loader_state)
            raise BadLoss(f"step {pending.step}: {problem}; stopped, nothing saved since, the batch is in {path}")
        record = {"step": pending.step, "stage": self.stage.name, "stage_step": pending.step - self.start, **metrics}
        if seconds:
            training, devices = self.stage.training, jax.devices()
            record["seconds"] = seconds
            record["tokens_per_second"] = training.batch_size * training.seq_len / seconds
            record["mfu"] = mfu(self.flops, seconds, devices[0].device_kind, len(devices))
        record["time"] = time.time()
        record = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in record.items()}
        if self.run_.writer is not None:
            self.run_.writer.write(record)
        self.run_.display.step(record)

    def save(self, step: int, fed: Fed) -> None:
        """Start a checkpoint of the state after `step`."""
        state = self.run_.state
        info = {
            "step": step,
            "stage": self.index,
            "loader": self.feed.whole_state(fed),
            "config": to_plain(self.run_.config),
            "parameters": describe_arrays(state.params),
            "optimizer": describe_arrays(state.optimizer),
        }
        self.run_.store.save(step, {"params": state.params, "optimizer": state.optimizer}, info)
        self.clock = time.monotonic()

    def evaluate(self, step: int) -> None:
        """Held-out losses by source, to metrics.jsonl and the display."""
        results = self.evaluator(self.run_.state.params)
        self.clock = time.monotonic()  # an evaluation is no part of a step's time
        if self.run_.writer is not None:
            self.run_.writer.write({"step": step, "eval": results})
        words = ", ".join(f"{source} {values['loss']:.4f}" for source, values in results.items())
        self.run_.display.say(f"step {step}: held-out loss {words}")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
