"""The steps of one stage: train, look at the loss, log, save, evaluate, stop."""

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import jax

from ringjax.training.arrays import describe_arrays
from ringjax.training.load import to_plain
from ringjax.training.mesh import is_simulated
from ringjax.training.stops import BadLoss, LossGuard, Preempted, StopSignals, save_bad_batch
from ringjax.training.task import DataEnded, Fed, Feeds, Task, Trains, count_parameters
from ringjax.training.waits import Waits

if TYPE_CHECKING:
    from ringjax.training.loop import Run


class Pending(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    fed: Fed
    metrics: dict[str, jax.Array]


class StageLoop:
    """The steps of one stage."""

    def __init__(self, run: "Run", index: int, task: Task, start: int, trainer: Trains, feed: Feeds, losses):
        """`losses`: the last ones of this stage before a resume, to judge the next ones by."""
        self.owner, self.index, self.task, self.start = run, index, task, start
        self.stage = stage = task.stage
        self.trainer, self.feed = trainer, feed
        self.end = start + stage.training.steps
        self.evaluator = task.evaluator(trainer, feed, run.config.seed)
        self.guard = LossGuard(stage.training.spike, losses)
        self.pending: list[Pending] = []
        self.newest: Fed | None = None
        self.clock: float | None = None
        self.waits = Waits()
        self.skipped: dict[str, int] = {}
        # Metrics are read one step late, so that the host prepares a step while the devices do the one before.
        # Simulated devices get no such lead: with few cores, programs that overlap wait for each other's threads.
        self.lag = 0 if is_simulated() else 1
        self.parameters = count_parameters(trainer.abstract.params)
        self.best = run.store.best(index) if run.config.checkpoint.keep_best else None
        self.held_out: float | None = None

    def run(self, done: int, signals: StopSignals, owed: bool = False) -> None:
        """Steps `done` + 1 … of the stage; saves at the end.

        `owed`: a signal came after step `done`, so its evaluation was left for now.
        """
        every, eval_every = self.owner.config.checkpoint.every, self.stage.training.eval_every
        if owed:
            self.evaluate(done)
        for step in range(done + 1, self.end + 1):
            with self.waits.on("data"):
                fed = self._next(step)
            self.owner.state, metrics = self.trainer.step(self.owner.state, self.feed.place(fed.rows))
            self.pending.append(Pending(step, fed, metrics))
            self.newest = fed
            if step < self.end:
                with self.waits.on("data"):
                    self.feed.prepare()
            self.report(keep=self.lag)
            self.owner.store.poll()
            signal = signals.received(step)
            owed, self.held_out, better = bool(eval_every) and (step % eval_every == 0 or step == self.end), None, False
            if owed and not (signal and step < self.end):
                self.report(keep=0)
                self.evaluate(step)  # before the checkpoint, so that a resume from it has the evaluation behind it
                better = self._is_best()
            if step == self.end:
                self.report(keep=0)
                self.finish()  # before the last checkpoint: a run that is whole has what it leaves
            if step % every == 0 or step == self.end or signal or better:
                self.report(keep=0)  # a state is saved only after its loss was seen
                self.save(step, fed, owed=bool(signal) and owed and step < self.end)
            if signal:
                self.owner.store.wait()
                raise Preempted(f"{signal} at step {step}: saved; the same command goes on from there")

    def _next(self, step: int) -> Fed:
        try:
            return self.feed.next()
        except DataEnded as error:
            if self.newest is not None:
                self.report(keep=0)
                self.save(step - 1, self.newest)
                self.owner.store.wait()
            raise DataEnded(f"after step {step - 1}: {error} (the state is saved)") from None

    def report(self, keep: int) -> None:
        """Read the metrics of all but the newest `keep` steps."""
        while len(self.pending) > keep:
            self.report_one(self.pending.pop(0))

    def report_one(self, pending: Pending) -> None:
        with self.waits.on("devices"):
            metrics = self.task.readable({k: float(value) for k, value in jax.device_get(pending.metrics).items()})
        now = time.monotonic()
        seconds, self.clock = None if self.clock is None else now - self.clock, now
        if problem := self.guard.problem(metrics["loss"], metrics["grad_norm"]):
            path = save_bad_batch(self.owner.folder, pending.step, pending.fed.rows, pending.fed.loader_state)
            raise BadLoss(f"step {pending.step}: {problem}; stopped, nothing saved since, the batch is in {path}")
        record = {"step": pending.step, "stage": self.stage.name, "stage_step": pending.step - self.start, **metrics}
        waited = self.waits.step(seconds)
        if seconds:
            record |= {"seconds": seconds, **waited, **self.task.speed(self.parameters, seconds, pending.fed.rows)}
        record["time"] = time.time()
        if self.owner.writer is not None:
            self.owner.writer.write(record)
        self.owner.display.step(record)
        if complaint := self.waits.complaint():
            self.owner.display.say(f"step {pending.step}: {complaint}")

    def save(self, step: int, fed: Fed, owed: bool = False) -> None:
        """Start a checkpoint of the state after `step`; `owed`: the evaluation of that step is still to be made."""
        state = self.owner.state
        if self.owner.writer is not None:
            self.owner.writer.sync()  # a machine that fails must not have the checkpoint and lack its steps
        info = {
            "step": step,
            "stage": self.index,
            "loader": self.feed.whole_state(fed),
            "config": to_plain(self.owner.config),
            "parameters": describe_arrays(state.params),
            "optimizer": describe_arrays(state.optimizer),
            "losses": self.guard.losses,
            "notes": self.owner.notes,
            "evaluation_owed": owed,
        }
        if self.held_out is not None:
            info["held_out_loss"] = self.held_out
        if self.owner.base is not None:
            info["base"] = self.owner.base
        self.owner.store.save(step, {"params": state.params, "optimizer": state.optimizer}, info)
        if self.feed.skipped != self.skipped:
            self.skipped = self.feed.skipped
            words = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            self.owner.display.say(f"step {step}: lines left out so far: {words}")
        self.clock = time.monotonic()

    def evaluate(self, step: int) -> None:
        """Held-out losses by source, to metrics.jsonl and the display."""
        results = self.evaluator(self.owner.state.whole)
        self.clock = time.monotonic()  # an evaluation is no part of a step's time
        if self.owner.writer is not None:
            self.owner.writer.write({"step": step, "eval": results})
        self.owner.display.say(f"step {step}: {self.task.describe_evaluation(results)}")
        losses = [found["loss"] for found in results.values() if found.get("loss") is not None]
        self.held_out = sum(losses) / len(losses) if losses else None

    def _is_best(self) -> bool:
        """Whether the state that was just evaluated is worth keeping before those of its stage."""
        found = self.held_out
        if not self.owner.config.checkpoint.keep_best or found is None or not math.isfinite(found):
            return False
        if self.best is not None and found >= self.best:
            return False
        self.best = found
        return True

    def finish(self) -> None:
        """What the task leaves in the run's folder at the end of its stage."""
        for line in self.task.finish(self.owner.folder, self.trainer, self.feed, self.owner.state.params):
            self.owner.display.say(line)
