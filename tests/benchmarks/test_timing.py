"""Turns, batches of calls and spread, by a clock that tells what it is told."""

import pytest

from ringjax.benchmarks import timing


class Clock:
    """Seconds that only programs use up."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def program(self, name: str, *costs: float):
        left = list(costs)

        def call():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return ()

        return call


def test_programs_take_turns_after_the_warm_up():
    clock = Clock()
    programs = {"a": clock.program("a", 9.0, 1.0), "b": clock.program("b", 2.0)}
    times = timing.in_turns(programs, repeats=3, warmup=2, clock=clock)
    assert "".join(clock.log) == "aabb" + "ab" * 3
    assert times["a"].seconds == (1.0, 1.0, 1.0)  # the first, slow call was the warm-up's
    assert times["b"].median == 2.0 and times["b"].calls == 1


def test_short_calls_are_made_back_to_back():
    clock = Clock()
    times = timing.in_turns({"a": clock.program("a", 0.01)}, repeats=2, warmup=1, run_seconds=0.05, clock=clock)
    assert times["a"].calls == 5 and clock.log.count("a") == 1 + 2 * 5
    assert times["a"].median == pytest.approx(0.01)
    fast = timing.in_turns({"a": clock.program("a", 1e-9)}, repeats=1, warmup=1, run_seconds=1, clock=clock)
    assert fast["a"].calls == timing.MOST_CALLS


def test_spread():
    times = timing.Times((3.0, 1.0, 2.0, 10.0), 1)
    assert (times.least, times.median, times.most) == (1.0, 2.5, 10.0)
    assert times.plain()["seconds"] == [3.0, 1.0, 2.0, 10.0]
