"""Times of programs that take turns, so that a clock that drifts is no advantage to any of them."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# More calls than this in flight only fill the queue of the device.
MOST_CALLS = 64


class Times(NamedTuple):
    """Seconds a call, one number a timed run, each over `calls` calls."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def most(self) -> float:
        return max(self.seconds)

    def plain(self) -> dict[str, Any]:
        return {
            "median": self.median, "min": self.least, "max": self.most, "calls": self.calls,
            "seconds": list(self.seconds),
        }  # fmt: skip


def in_turns(
    programs: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int,
    run_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Times of each program: warm-up of all, then `repeats` rounds in which each has one timed run.

        A A  B B  |  A B  A B  A B …

    A run makes as many calls, back to back, as take about `run_seconds`, and waits once, for the last: the device is
    kept busy and the host's part of a call is hidden behind the call before, as it is in a training step. With
    `run_seconds` 0 each call is waited for.
    """
    calls = {}
    for name, program in programs.items():
        for _ in range(warmup):
            once = _run(program, 1, clock)
        calls[name] = max(1, min(MOST_CALLS, math.ceil(run_seconds / max(once, 1e-9)))) if run_seconds else 1
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            seconds[name].append(_run(program, calls[name], clock) / calls[name])
    return {name: Times(tuple(runs), calls[name]) for name, runs in seconds.items()}


def _run(program: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    """Seconds of `calls` calls and the wait for the last. Devices work in order, so it ends after all others."""
    start = clock()
    for _ in range(calls):
        result = program()  # the result before is let go: its memory serves the next
    jax.block_until_ready(result)
    return clock() - start
