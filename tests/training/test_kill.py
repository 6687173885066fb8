"""Killed at any moment, the same command goes on to the same losses, float for float."""

import random
import signal
import time

import pytest

from ringjax.training.metrics import read_metrics
from tests.training.runs import curve, finish, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start(folder, cache=cache))
    return folder


def wait_for_steps(process, folder, steps):
    while process.poll() is None and len(curve(folder)) < steps:
        time.sleep(0.002)


@pytest.mark.parametrize("seed", range(2))
def test_kill_9_changes_no_loss(tmp_path, cache, unbroken, seed):
    folder, rng = tmp_path / "run", random.Random(seed)
    for _ in range(4):
        process = start(folder, cache=cache)
        wait_for_steps(process, folder, len(curve(folder)) + rng.randint(-2, 5))
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
    printed = finish(start(folder, cache=cache))
    assert "done after step 24" in printed
    assert curve(folder) == curve(unbroken)
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "eval" in r] == [8, 16, 24]


def test_sigterm_exits_with_75_and_the_same_command_goes_on(tmp_path, cache, unbroken):
    folder = tmp_path / "run"
    process = start(folder, cache=cache)
    wait_for_steps(process, folder, 4)
    process.send_signal(signal.SIGTERM)
    printed = finish(process, code=75)
    assert "saved; the same command goes on from there" in printed and "Traceback" not in printed
    assert "going on after step" in finish(start(folder, cache=cache))
    assert curve(folder) == curve(unbroken)
