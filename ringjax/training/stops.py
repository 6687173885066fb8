"""The ways a run ends before its last step: a signal, or a loss that cannot be trusted."""

import contextlib
import json
import math
import signal
import statistics
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

WINDOW = 100  # steps whose median a new loss is compared with
LEAST = 20  # fewer than this say nothing


class Preempted(RuntimeError):
    """SIGTERM or SIGINT arrived; the state was saved and the same command goes on from there."""


class BadLoss(RuntimeError):
    """The loss is NaN or jumped; nothing of it was saved, and the batch was written down."""


class StopSignals(contextlib.AbstractContextManager):
    """Notes SIGTERM and SIGINT while it is entered; a second SIGINT interrupts at once."""

    def __init__(self):
        self._name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self):
        # Handlers can be set in the main thread only. With several processes SIGTERM is left to JAX, which tells all
        # of them: a process that stopped alone would leave the others waiting for it.
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else []
            self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self._name:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name

    def received(self, step: int) -> str | None:
        """The signal to stop for, the same on all processes, or None."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name


class LossGuard:
    """Looks at every loss: NaN, infinity and jumps end the run."""

    def __init__(self, spike: float, history: Iterable[float] = ()):
        """`spike`: nats above the median of the last losses that are too many, 0 for any; `history`: losses so far."""
        self._spike = spike
        self._losses = deque(history, maxlen=WINDOW)

    @property
    def losses(self) -> list[float]:
        """The losses that the next one is compared with."""
        return list(self._losses)

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, or None; a good loss is remembered."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:.4g}, gradient norm {grad_norm:.4g}: not a finite number"
        if self._spike and len(self._losses) >= LEAST:
            median = statistics.median(self._losses)
            if loss > median + self._spike:
                return f"loss {loss:.4g} is more than training.spike {self._spike:g} above the median {median:.4g}"
        self._losses.append(loss)
        return None


def save_bad_batch(run_dir: Path, step: int, batch: dict[str, np.ndarray], loader_state: Any) -> Path:
    """Write the batch of a bad step, with the step and the loader's state as JSON text; read without pickle."""
    suffix = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = Path(run_dir) / f"bad_batch{suffix}.npz"
    np.savez_compressed(path, **batch, step=np.array(step), loader_state=np.array(json.dumps(loader_state)))
    return path
