"""The background thread changes nothing but the time."""

import gc
import threading
import time

import pytest

from ringjax.data.prefetch import Prefetched


class Count:
    """0, 1, … `end` − 1."""

    def __init__(self, end: int, fault_at: int | None = None):
        self.at, self.end, self.fault_at = 0, end, fault_at

    def __next__(self):
        if self.at == self.fault_at:
            raise ValueError("fault")
        if self.at >= self.end:
            raise StopIteration
        self.at += 1
        return self.at - 1

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


def threads() -> int:
    return sum(thread.name == "ringjax-prefetch" for thread in threading.enumerate())


def test_the_state_stays_with_the_reader():
    ahead = Prefetched(Count(10), 3)
    assert [next(ahead) for _ in range(4)] == [0, 1, 2, 3]
    time.sleep(0.05)
    assert ahead.get_state() == 4
    ahead.set_state(2)
    assert list(ahead) == list(range(2, 10))
    with pytest.raises(StopIteration):
        next(ahead)
    assert threads() == 0


def test_an_error_comes_in_its_place():
    ahead = Prefetched(Count(10, fault_at=2), 5)
    assert [next(ahead), next(ahead)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="fault"):
            next(ahead)
    assert ahead.get_state() == 2


def test_the_thread_ends_with_the_reader():
    ahead = Prefetched(Count(1000), 2)
    next(ahead)
    assert threads() == 1
    del ahead
    gc.collect()
    assert threads() == 0
    ahead = Prefetched(Count(1000), 2)
    next(ahead), next(ahead)
    ahead.close()
    assert threads() == 0
    assert next(ahead) == 2
    ahead.close()
