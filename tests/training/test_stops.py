"""Signals and losses that end a run."""

import json
import os
import signal

import numpy as np
import pytest

from ringjax.training.stops import LossGuard, StopSignals, save_bad_batch


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received(1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received(2) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_does_not_wait():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received(1) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("loss, norm", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_what_is_not_finite_is_a_problem(loss, norm):
    assert "not a finite number" in LossGuard(0.0).problem(loss, norm)


def test_a_jump_is_a_problem_once_there_is_a_history():
    guard = LossGuard(2.0)
    assert all(guard.problem(loss, 1.0) is None for loss in [9.0, 3.0, *[2.0] * 18])
    assert guard.problem(3.9, 1.0) is None
    assert "more than training.spike 2 above the median 2" in guard.problem(4.1, 1.0)
    assert LossGuard(2.0, [2.0] * 30).problem(4.1, 1.0)  # history of the run before a resume
    assert LossGuard(0.0, [2.0] * 30).problem(400.0, 1.0) is None


def test_the_bad_batch_is_read_without_pickle(tmp_path):
    path = save_bad_batch(tmp_path, 7, {"tokens": np.arange(4, dtype=np.int32)}, {"epoch": 2})
    with np.load(path, allow_pickle=False) as saved:
        assert saved["tokens"].tolist() == [0, 1, 2, 3]
        assert int(saved["step"]) == 7 and json.loads(str(saved["loader_state"])) == {"epoch": 2}
