"""Who waits for whom: the loop for its next batch, or for the devices.

    data wait      from asking for a batch until it is there; while it lasts the devices do the step before
    device wait    from asking for a step's metrics until the devices have them

Devices that are never waited for have nothing to do while batches are made.
"""

import collections
import contextlib
import time
from collections.abc import Iterator

# Steps that are judged together, which share of their time batches may take, and which the devices must.
_STEPS, _DATA, _DEVICES = 50, 0.5, 0.05


class Waits:
    """What the loop waited for, step by step; says once that the devices wait for data."""

    def __init__(self) -> None:
        self._now = dict.fromkeys(("data", "devices"), 0.0)
        self._last: collections.deque[tuple[float, float, float]] = collections.deque(maxlen=_STEPS)
        self._said = False

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """The time in the block is waiting for "data" or "devices"."""
        start = time.monotonic()
        yield
        self._now[what] += time.monotonic() - start

    def step(self, seconds: float | None) -> dict[str, float]:
        """A step took so long (None: not known, as the first of a stage); gives what its record says of waiting."""
        data, devices = self._now.values()
        self._now = dict.fromkeys(self._now, 0.0)
        if not seconds:
            return {}
        self._last.append((seconds, data, devices))
        return {"data_seconds": data}

    def complaint(self) -> str | None:
        """Once, if in the last steps batches took most of the time and the devices next to none."""
        if self._said or len(self._last) < _STEPS:
            return None
        seconds, data, devices = (sum(times) for times in zip(*self._last))
        self._said = data > _DATA * seconds and devices < _DEVICES * seconds
        if not self._said:
            return None
        whole, part = (1000 * time / _STEPS for time in (seconds, data))
        return (
            f"the devices wait for data: {part:.0f} of {whole:.0f} ms a step went into waiting for its batch; what is"
            " tokenized ahead is read faster than text, and long examples faster than many short ones"
        )
