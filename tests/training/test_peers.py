"""Which process is lost: the judgement, and its way through the store; `scripts/fault_campaign.py` kills real ones."""

import threading
import time

import jax
import pytest

from ringjax.exit_codes import ExitCode
from ringjax.training import peers
from ringjax.training.config import DistributedConfig
from ringjax.training.peers import Judge, Watch


def test_who_counts_on_is_alive_and_who_stands_still_is_silent():
    judge = Judge(patience=10, now=100)
    for now in range(101, 130):
        judge.hear(1, str(now), now)
        judge.hear(2, "7", now)
    assert judge.silent(1, 130) is None
    assert judge.silent(2, 130) == 29  # since its counter was first read
    assert judge.silent(3, 130) == 30 and judge.silent(3, 109) is None  # never heard of


class Store:
    """The coordinator's key-value store."""

    def __init__(self):
        self.found: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.found[key] = value

    def key_value_try_get(self, key):
        if key not in self.found:
            raise jax.errors.JaxRuntimeError("NOT_FOUND: no such key")
        return self.found[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.found.items() if key.startswith(folder)]


class Left(BaseException):
    pass


def watch(store, index, count, patience=3):
    def leave(code):
        raise Left(code)

    made = Watch(DistributedConfig(heartbeat_seconds=patience), leave=leave)
    made._client, made._index, made._count, made._address = store, index, count, "127.0.0.1:1"
    made._tick = 0.01
    made._put(f"name/{index}", f"host{index}, pid 1")
    return made


def test_process_0_names_who_ended_and_all_others_hear_it(capsys):
    store = Store()
    first, third = watch(store, 0, 3), watch(store, 2, 3)
    watch(store, 1, 3)._put("ended/1", "DiskError: the disk is full")
    with pytest.raises(Left, match=str(int(ExitCode.PEER_LOST))):
        first._talk()
    assert "process 1 (host1, pid 1) has ended with DiskError: the disk is full" in capsys.readouterr().err
    with pytest.raises(Left):
        third._talk()
    said = capsys.readouterr().err
    assert "process 1 (host1, pid 1) has ended with DiskError" in said and "this is process 2" in said


def test_a_process_that_ended_in_order_is_not_lost(monkeypatch):
    store = Store()
    first = watch(store, 0, 2)
    first._patience = 0.0
    watch(store, 1, 2)._put("ended/1", "")
    assert first._judged(Judge(0.0, 0.0)) is None


def test_process_0_whose_store_answers_and_whose_counter_stands_still_is_frozen():
    store = Store()
    second = watch(store, 1, 2)
    store.found["ringjax/peers/alive/0"] = "7"
    judge = Judge(patience=0.05, now=time.monotonic())
    assert second._verdict(judge) is None
    time.sleep(0.1)
    assert second._verdict(judge)[0] == 0 and "frozen" in second._verdict(judge)[1]
    store.found["ringjax/peers/alive/0"] = "8"
    assert second._verdict(judge) is None


def test_an_answer_that_does_not_come_is_process_0_lost(capsys):
    second = watch(Store(), 1, 2)
    second._patience, second._names = 0.02, {0: "host0, pid 1"}
    with pytest.raises(Left):
        second._look()
    assert "process 0 (host0, pid 1) which coordinates the others has not answered" in capsys.readouterr().err


def test_an_error_of_its_own_is_left_as_last_words(monkeypatch):
    monkeypatch.setattr(peers, "_alone", threading.Event())
    store = Store()
    own = watch(store, 1, 2)
    own.__exit__(OSError, OSError(28, "No space left on device"), None)
    assert "No space left" in store.found["ringjax/peers/ended/1"] and peers._alone.is_set()
    agreed = watch(store, 1, 2)
    agreed.__exit__(None, None, None)
    assert store.found["ringjax/peers/ended/1"] == ""


def test_an_abort_is_caught_and_given_back():
    """In another process: Python's own handlers do not see abort()."""
    import subprocess
    import sys

    code = "import os; from ringjax.training import peers; peers._catch_abort(lambda: os._exit(69)); os.abort()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 69
    code = (
        "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); from ringjax.training import peers;"
        " peers._catch_abort(lambda: os._exit(69)); peers._catch_abort(None); os.abort()"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -6
