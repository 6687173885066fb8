"""What the cases of one `ringjax bench attention` share: inputs, expected results, the one-device kernel, the clock."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from ringjax.benchmarks import check, programs, timing, workload
from ringjax.benchmarks.baseline import Baselines
from ringjax.benchmarks.config import AttentionBench
from ringjax.benchmarks.memory import peak_bytes
from ringjax.benchmarks.programs import Program
from ringjax.benchmarks.rows import Row
from ringjax.benchmarks.workload import Workload


class Session:
    """A config and the devices. Raises ValueError when there are fewer than it asks for."""

    def __init__(self, config: AttentionBench, say: Callable[[str], None]):
        self.config, self.say = config, say
        count = len(jax.devices())
        if config.devices is not None and config.devices > count:
            raise ValueError(
                f"devices is {config.devices} and there are {count}; ask for fewer, or simulate them on the CPU with"
                " --simulated_devices"
            )
        self.ring_size = config.share or config.devices or count
        self.baselines = Baselines(config.baseline_up_to, say)
        self.timed_baselines: dict[tuple[Workload, str], dict[str, Any]] = {}
        self.best_settings: dict[tuple, str] = {}
        self._expected: dict[tuple, list[check.Expected]] = {}
        self._errors: dict[tuple, check.Errors] = {}

    def forget(self) -> None:
        """Let go of what was found about the workloads so far."""
        self.best_settings, self._expected, self._errors = {}, {}, {}

    def once(self, key: tuple, errors: Callable[[], check.Errors]) -> check.Errors:
        """`errors()`, found once for each key: the check at `check_length` serves all lengths."""
        if key not in self._errors:
            self._errors[key] = errors()
        return self._errors[key]

    def inputs(self, work: Workload) -> tuple[Array, ...]:
        """q, k, v and dout in ascending order, cut over the ring's devices (on one device for a share)."""
        if self.ring_size == 1 or self.config.share or work.length % self.ring_size:
            return workload.inputs(work)
        return workload.inputs(work, NamedSharding(programs.ring_mesh(self.ring_size), programs.SEQUENCE))

    def expected(self, work: Workload, ascending, count: int | None) -> list[check.Expected]:
        """What is right, asked once for all ways of a workload."""
        if (work, count) not in self._expected:
            asked = check.questions(work, ascending, count)
            self._expected[work, count] = [check.Expected.of(question) for question in asked]
        return self._expected[work, count]

    def checks(self, work: Workload, ring_size: int) -> list[tuple[Workload, int | None]]:
        """The workloads that a way is checked on, its own first, and how many queries of each (None: all)."""
        # Every layout can cut a multiple of this, into shards that a kernel's tiles fit.
        multiple, wanted = 256 * ring_size, self.config.check_length
        whole = max(multiple, wanted // multiple * multiple) if wanted else 0
        if work.length <= whole:
            return [(work, None)]
        return [(work, self.config.check_rows), *([(work.at(whole), None)] if whole else [])]

    def time(self, work: Workload, kind: str, ascending, **others: Program | None) -> dict[str, timing.Times]:
        """Times of programs in turn with the one-device kernel ("baseline", where there is one)."""
        baseline = self.baselines.get(work, kind, ascending)
        turns = {"baseline": baseline and baseline.program, **others}
        # Programs in flight together would fight for the few threads of simulated devices.
        seconds = 0.0 if jax.devices()[0].platform == "cpu" else self.config.run_seconds
        return timing.in_turns(
            {name: program.call for name, program in turns.items() if program is not None},
            repeats=self.config.repeats, warmup=self.config.warmup, run_seconds=seconds,
        )  # fmt: skip

    def fill(self, row: Row, work: Workload, ascending, times: dict[str, timing.Times], devices: int) -> None:
        """A row's times and rate (of `devices` that share the work) beside the one-device kernel's."""
        row.times, row.rate = times["ours"].plain(), row.flops / devices / times["ours"].median
        row.peak_bytes = peak_bytes()
        baseline = self.baselines.get(work, row.kind, ascending)
        if baseline is not None:
            row.baseline = {
                "name": baseline.name, "length": baseline.work.length, "mask": baseline.work.mask,
                "rate": baseline.rate(times["baseline"].median), **times["baseline"].plain(),
            }  # fmt: skip
            self.timed_baselines[work, row.kind] = row.baseline
