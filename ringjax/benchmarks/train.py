"""`ringjax bench train CONFIG`: whole training steps, by the functions that `ringjax train` uses."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ringjax.attention import layouts
from ringjax.benchmarks.choices import backend_choices
from ringjax.benchmarks.config import TrainBench
from ringjax.benchmarks.memory import compiled_memory, gib, peak_bytes
from ringjax.benchmarks.profile import Profile, profiled
from ringjax.data.packing import empty_batch
from ringjax.models.parallel import Parallel
from ringjax.training import distributed
from ringjax.training.config import RunConfig, StageConfig
from ringjax.training.distributed import place_batch, row_group
from ringjax.training.feed import DataEnded, Feed, check_data
from ringjax.training.load import check_devices, mesh_shape
from ringjax.training.mesh import is_simulated, make_mesh, simulate_devices
from ringjax.training.progress import format_count
from ringjax.training.step import make_trainer
from ringjax.training.transformer_task import step_flops
from ringjax.training.utilisation import mfu, peak_flops
from ringjax.training.yaml_tree import ConfigError

Batch = dict[str, jax.Array]
Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Measured steps of a stage. Seconds and useful FLOPs of each; bytes on one device; `losses` of the first and the
    last step run."""

    stage: str
    parameters: int
    rows: int
    tokens: int
    accumulation: int
    mesh: dict[str, int]
    layout: str
    strategy: str
    remat: str
    dtype: str
    data: str
    choices: tuple[str, ...]
    compile_seconds: float
    seconds: tuple[float, ...]
    flops: tuple[float, ...]
    mfu: float | None
    losses: tuple[float, float]
    memory: dict[str, int]
    peak_bytes: int | None
    profile: Profile | None
    used: float = 1.0
    """Share of the slots that hold a token; the rest is padding."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Without padding, as in training."""
        return self.used * self.rows * self.tokens / self.median

    @property
    def flops_per_second(self) -> float:
        """Useful ones: the median over the steps, for rows that are not full are not all the same work."""
        return _useful_rate(self.flops, self.seconds)

    @property
    def good(self) -> bool:
        return all(math.isfinite(loss) for loss in self.losses)

    def plain(self) -> dict[str, Any]:
        derived = dict(median=self.median, min=min(self.seconds), max=max(self.seconds))
        rates = {name: getattr(self, name) for name in ("tokens_per_second", "flops_per_second")}
        return {**dataclasses.asdict(self), **derived, **rates}


def prepare(run: RunConfig) -> None:
    """Start the devices as training does, and check the config against them."""
    simulate_devices(max(stage.mesh.simulated_devices for stage in run.stage_list))
    distributed.start(run.distributed)
    check_devices(run, len(jax.devices()), is_simulated())


def run_train(run: RunConfig, config: TrainBench, say: Callable[[str], None]) -> TrainResult:
    """Compile, warm up and time the steps of one stage; `prepare` has been called."""
    stage = _stage(run, config.stage)
    mesh = make_mesh(mesh_shape(stage, is_simulated()))
    asked = stage.mesh
    parallel = Parallel(mesh, asked.layout, asked.strategy, asked.backend, host_size=asked.host_size)
    training = stage.training
    trainer = make_trainer(stage.model, stage.optimizer, parallel, steps=training.steps, start=0, lora=run.lora)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.abstract.params))
    count = functools.partial(step_flops, stage, run.lora, parameters)
    with _batches(run, stage, mesh, config.data, say, count) as (data, batches):
        first = next(batches)
        with backend_choices() as choices:
            start = time.perf_counter()
            step = trainer.step.lower(trainer.abstract, first.batch).compile()
            compile_seconds = time.perf_counter() - start
        memory = compiled_memory(step)
        say(f"compiled in {compile_seconds:.1f} s")
        timed = _Steps(step, trainer.init(run.seed), first, batches)
        seconds = timed.run(config.warmup, config.steps)
        profile = None
        if config.profile:
            profile = profiled(config.profile, timed.step, step.as_text() or "", say, top=config.top)
    measured = timed.fed[config.warmup :][: config.steps]
    flops = tuple(fed.flops for fed in measured)
    devices = jax.devices()
    return TrainResult(
        stage.name, parameters, training.batch_size, training.seq_len, training.accumulation, dict(mesh.shape),
        stage.mesh.layout, stage.mesh.strategy, stage.model.remat, stage.model.dtype, data, tuple(choices),
        compile_seconds, tuple(seconds), flops,
        mfu(_useful_rate(flops, seconds), 1.0, devices[0].device_kind, len(devices)), timed.losses(), memory,
        peak_bytes(), profile, statistics.fmean(fed.used for fed in measured),
    )  # fmt: skip


def _useful_rate(flops: Sequence[float], seconds: Sequence[float]) -> float:
    return statistics.median(done / took for done, took in zip(flops, seconds, strict=True))


class _Fed(NamedTuple):
    """A placed batch, the share of its slots that hold a token, and the useful FLOPs of a step on it."""

    batch: Batch
    used: float
    flops: float


class _Steps:
    """Steps one after the other, each dispatched while the one before runs, as the training loop does."""

    def __init__(self, step, state, first: _Fed, batches: Iterator[_Fed]):
        self._step, self._state, self._next, self._batches = step, state, first, batches
        self.fed: list[_Fed] = []
        self._losses: list[jax.Array] = []
        # Simulated devices get no lead: programs that overlap wait for each other's threads.
        self._lag = 0 if is_simulated() else 1

    def step(self):
        """Dispatch a step and read the batch after it; gives what to wait for."""
        self._state, metrics = self._step(self._state, self._next.batch)
        self._losses.append(metrics["loss"])
        self.fed.append(self._next._replace(batch={}))  # the arrays may go
        self._next = next(self._batches)
        return metrics["loss"]

    def run(self, warmup: int, steps: int) -> list[float]:
        """Seconds from the end of one step to the end of the next, for each timed step."""
        jax.block_until_ready(self._state)
        with _Ends() as ends:
            for step in range(warmup + steps):
                ends.watch(self.step())
                ends.wait(step - self._lag)
        return np.diff(ends.times)[warmup:].tolist()

    def losses(self) -> tuple[float, float]:
        return float(self._losses[0]), float(self._losses[-1])


class _Ends:
    """When the steps end, seen by a thread of its own: dispatching the next step may keep the main one waiting.

    `times` begins with the start; `watch(array)` adds an end, `wait(i)` returns when step i has ended (none if i < 0).
    """

    def __init__(self):
        self.times = [time.perf_counter()]
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: list[concurrent.futures.Future] = []

    def __enter__(self):
        return self

    def watch(self, array: jax.Array) -> None:
        self._pending.append(self._thread.submit(self._ended, array))

    def wait(self, step: int) -> None:
        if step >= 0:
            self._pending[step].result()

    def __exit__(self, *_):
        self._thread.shutdown()
        for ended in self._pending:
            ended.result()  # an error of a step is raised here

    def _ended(self, array: jax.Array) -> None:
        jax.block_until_ready(array)
        self.times.append(time.perf_counter())


def _stage(run: RunConfig, name: str | None) -> StageConfig:
    for stage in run.stage_list:
        if name in (None, stage.name):
            return stage
    names = ", ".join(stage.name for stage in run.stage_list)
    raise ConfigError(f"--bench.stage: there is no stage {name!r}; the stages are {names}")


@contextlib.contextmanager
def _batches(
    run: RunConfig, stage: StageConfig, mesh, wanted: str, say: Callable[[str], None], count: Callable[[Rows], float]
):
    """What the batches are, and an endless iterator of them; `count` gives the useful FLOPs of a batch's rows."""
    if wanted != "synthetic":
        try:
            check_data(dataclasses.replace(run, stages=(stage,)))
        except ConfigError as error:
            if wanted == "config":
                raise
            say(f"random tokens: the config's own data cannot be used ({str(error).splitlines()[0]})")
            wanted = "synthetic"
    if wanted == "synthetic":
        training = stage.training
        group = row_group(mesh, training.batch_size // training.accumulation)
        rows = synthetic(stage, mesh.shape["sp"], group)
        batch = place_batch(rows, mesh, training.accumulation, group)
        yield "random tokens, a document a row", itertools.repeat(_Fed(batch, 1.0, count(rows)))
        return
    with Feed(stage, mesh, run.seed) as feed:
        yield "the config's own", _endless(feed, count)


def _endless(feed: Feed, count: Callable[[Rows], float]) -> Iterator[_Fed]:
    while True:
        try:
            rows = feed.next().rows
            yield _Fed(feed.place(rows), float(np.mean(rows["behind"] >= 0)), count(rows))
        except DataEnded as error:
            raise ConfigError(f"{error}, or give --bench.data synthetic") from None


def synthetic(stage: StageConfig, ring_size: int, group: tuple[int, int]) -> Rows:
    """This process's rows of random text tokens, one document a row, in layout order."""
    training = stage.training
    rows, length = training.batch_size // group[1], training.seq_len
    tokens = np.random.default_rng(group[0]).integers(0, stage.model.vocab_size, (rows, length + 1), np.int32)
    batch = empty_batch(rows, length)
    batch["tokens"], batch["targets"] = tokens[:, :-1], tokens[:, 1:]
    batch["loss_weights"] = np.ones((rows, length), np.float32)
    batch["positions"] = batch["behind"] = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    order = layouts.get(stage.mesh.layout)
    return {name: np.asarray(order.permute(x, ring_size, axis=1)) for name, x in batch.items()}


def lines(result: TrainResult, device_kind: str, devices: int) -> list[tuple[str, str]]:
    """What was measured, as name and value."""
    ms = [1e3 * seconds for seconds in (result.median, min(result.seconds), max(result.seconds))]
    peak = peak_flops(device_kind)
    memory = ", ".join(f"{name.replace('_', ' ')} {gib(count)}" for name, count in result.memory.items() if count)
    mesh = " ".join(f"{axis} {size}" for axis, size in result.mesh.items())
    known = "" if peak is None else f" of {peak * devices / 1e12:.0f} TFLOP/s"
    return [
        (
            "model",
            f"{format_count(result.parameters)} parameters, {result.dtype}, remat {result.remat}; {result.stage}",
        ),
        ("a step", f"{result.rows} × {result.tokens} tokens, {result.accumulation} micro-batch(es); {result.data}"),
        ("mesh", f"{mesh}, {result.layout} {result.strategy}"),
        *(("attention", choice) for choice in result.choices),
        ("slots in use", f"{100 * result.used:.1f} %"),
        ("step", f"{ms[0]:.1f} ms ({ms[1]:.1f} – {ms[2]:.1f}, {len(result.seconds)} steps)"),
        ("tokens/s", f"{result.tokens_per_second:,.0f} ({result.tokens_per_second / devices:,.0f} a device)"),
        ("MFU", "not known for this device" if result.mfu is None else f"{100 * result.mfu:.1f} %{known}"),
        ("useful FLOP/s", f"{result.flops_per_second / devices / 1e12:.3g} TFLOP/s a device"),
        ("peak memory", "not reported by this device" if result.peak_bytes is None else gib(result.peak_bytes)),
        ("compiled", f"{memory or 'not reported'} (a device), in {result.compile_seconds:.1f} s"),
        ("loss", f"{result.losses[0]:.4f} first, {result.losses[1]:.4f} last"),
    ]
