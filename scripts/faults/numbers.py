"""Clocks that jump, memory that does not suffice, losses that are NaN or jump."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax

from faults.lab import STEPS, Kind, Lab, Outcome, curve, finished, require, whole
from ringjax.exit_codes import ExitCode
from ringjax.training.transformer_task import TransformerTask

YEAR = 365 * 86400.0


def clock(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """The wall clock jumps at a random instant, days ahead or back; files are dated years in past and future."""
    run = lab.copy_half(folder / "run")
    real = time.time
    for path in run.rglob("*"):
        stamp = real() + rng.uniform(-5, 5) * YEAR
        os.utime(path, (stamp, stamp))
    before = whole(run)
    jump, instant = rng.uniform(-10, 10) * 86400.0, time.monotonic() + rng.random() * 0.8
    with mock.patch("time.time", lambda: real() + jump * (time.monotonic() > instant)):
        lab.require_resumed(run, before)
    return Outcome("no step, checkpoint or loss depends on it")


@contextlib.contextmanager
def _faulty_step(number: int, fault: Callable) -> Iterator[None]:
    """Training whose call `number` of the compiled step is `fault(step, state, batch)`."""
    real = TransformerTask.trainer

    def trainer(self, *arguments):
        made, calls = real(self, *arguments), iter(range(1, 1_000_000))

        def step(state, batch):
            return fault(made.step, state, batch) if next(calls) == number else made.step(state, batch)

        return made._replace(step=step)

    with mock.patch.object(TransformerTask, "trainer", trainer):
        yield


def memory(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """The allocator's error at a random step: what JAX raises, raised in place of a step."""
    run, number = folder / "run", rng.randint(1, STEPS)

    def fault(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")

    with _faulty_step(number, fault):
        ended = lab.train(run)
    ended.require(ExitCode.MEMORY, "largest arrays on each device: ", "float32[", "planner's arithmetic", "68719476736")
    lab.require_resumed(run)
    return Outcome("exit 71 with the largest arrays and the planner's advice", f"at step {number}")


def memory_limit(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """A step that needs more than the machine may give (`ulimit -v`)."""
    run, log = lab.copy_half(folder / "run"), folder / "log"
    before, most = whole(run), rng.randint(6, 10) * 2**30
    large = ("--model.vocab_size", str(rng.randint(200, 400) * 10**6))
    script = folder / "limited.py"
    script.write_text(
        "import resource, sys\nfrom ringjax import cli\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({most}, {most}))\nsys.exit(cli.main(sys.argv[1:]))\n"
    )
    with open(log, "wb") as file:
        command = [sys.executable, str(script), *lab.arguments(folder / "large", *large)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    ended = finished(process, log)
    ended.require(ExitCode.MEMORY, "largest arrays on each device", "planner's arithmetic")
    lab.require_resumed(run, before)
    return Outcome("exit 71 with the largest arrays and the planner's advice", ended.printed[-200:])


def _spoil(factor: float) -> Callable:
    def fault(step, state, batch):
        spoiled = jax.tree.map(lambda x: x * factor, state.params)
        return step(state._replace(params=spoiled), batch)

    return fault


def nan(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """The parameters become NaN once, as by a faulty device."""
    run, number = folder / "run", rng.randint(1, STEPS)
    with _faulty_step(number, _spoil(float("nan"))):
        ended = lab.train(run).require(ExitCode.DIVERGED, f"step {number}: loss nan", "bad_batch.npz")
    require(len(curve(run)) == number - 1, "a step with NaN is in the metrics")
    lab.require_resumed(run)
    return Outcome("exit 3, nothing of it saved; the same command went on", ended.printed.splitlines()[-1][:100])


def spike(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """The loss jumps once there are enough steps to compare with."""
    run, number = folder / "run", rng.randint(21, STEPS)
    with _faulty_step(number, _spoil(30.0)):
        lab.train(run).require(ExitCode.DIVERGED, "more than training.spike 1 above the median")
    lab.require_resumed(run)
    return Outcome("exit 3, nothing of it saved; the same command went on", f"at step {number}")


def diverges(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """A learning rate that is too high: the same command diverges again at the same step, and loses nothing."""
    run = lab.copy_half(folder / "run")
    before, rate = whole(run), f"{10 ** rng.uniform(4, 12):.3e}"
    options = ("--optimizer.learning_rate", rate, "--optimizer.clip_norm", "0")
    said = [lab.train(run, *options).require(ExitCode.DIVERGED).printed.splitlines()[-1] for _ in range(2)]
    require(said[0] == said[1], f"diverged elsewhere the second time: {said}")
    lab.require_resumed(run, before & whole(lab.half))
    return Outcome("exit 3 at the same step each time; the rate put back, it went on", said[0][:120])


KINDS = [
    Kind("clock", "the wall clock jumps by up to ten days at a random instant; files dated by years off", clock, 12, 1),
    Kind("memory", "RESOURCE_EXHAUSTED at a random step", memory, 6, 1),
    Kind("memory_limit", "a step too large for `ulimit -v`", memory_limit, 2, 0),
    Kind("nan", "parameters become NaN at a random step", nan, 8, 1),
    Kind("spike", "parameters grow thirtyfold at a random step", spike, 5, 1),
    Kind("diverges", "a learning rate of 10⁴ to 10¹²", diverges, 3, 0),
]
