"""Several processes: one that is gone or frozen is named by all others, which stop within `heartbeat_seconds`.

    each process    alive/I  <- a counter, every tick          process 0    reads all counters;
                    ended/I  <- "" or its last words                        lost  <- which process, and why

All of it goes over the coordinator's key-value store, which lives in process 0: who gets no answer from it, or sees
its counter stand still, has lost process 0. A collective that waits for a lost process cannot be interrupted, so the
watching thread ends its own process. JAX has heartbeats of its own, which end a process by abort(): they are set to
come later, and where the coordinator is gone, which JAX notices at once, its abort() is turned into the same message
and exit code.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from ringjax.disk import chain
from ringjax.exit_codes import ExitCode
from ringjax.training.config import DistributedConfig
from ringjax.training.coordinator import coordinator

_FOLDER = "ringjax/peers"
_rounds = itertools.count()
_LINGER = 4.0
_OF_COLLECTIVES = (
    r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|connection (reset|refused|closed)|socket closed|peer|barrier"
)


class Judge:
    """Which process has been silent for too long, from counters that should grow. Knows no clock but `now`."""

    def __init__(self, patience: float, now: float):
        self._patience, self._begun = patience, now
        self._seen: dict[int, tuple[str, float]] = {}

    def hear(self, process: int, count: str, now: float) -> None:
        """A counter was read."""
        if self._seen.get(process, ("", 0.0))[0] != count:
            self._seen[process] = count, now

    def silent(self, process: int, now: float) -> float | None:
        """For how many seconds a process has been silent, where that is too long."""
        since = now - self._seen.get(process, ("", self._begun))[1]
        return since if since > self._patience else None


class Watch(contextlib.AbstractContextManager):
    """While it is entered, a lost process ends this one with exit code PEER_LOST; does nothing for a process alone."""

    def __init__(
        self, config: DistributedConfig, leave: Callable[[int], NoReturn] = os._exit,
        goes_on: str = "goes on from the last whole checkpoint",
    ):  # fmt: skip
        """`leave` ends the process; `goes_on` says what the same command does when it is run again."""
        self._patience, self._leave, self._goes_on = float(config.heartbeat_seconds), leave, goes_on
        self._tick = min(2.0, self._patience / 10)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._client: Any = None
        self._folder = _FOLDER
        self._names: dict[int, str] = {}
        self._answered = time.monotonic()
        self._threads: list[threading.Thread] = []

    def __enter__(self):
        found = coordinator()
        if found is None:
            return self
        self._client, self._address, self._index, self._count = found
        self._folder = f"{_FOLDER}/{next(_rounds)}"  # a second run of the same processes begins afresh
        self._client.key_value_set(f"{self._folder}/name/{self._index}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._answered = time.monotonic()
        _catch_abort(self._aborted)
        for target in (self._talk, self._look):
            thread = threading.Thread(target=target, name=f"peers {target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind, error, trace):
        if self._client is None:
            return
        if error is None or is_agreed(error):
            self._put(f"ended/{self._index}", "")
            self._stop.set()
            _catch_abort(None)
            return
        self._end_with(error)

    # ------------------------------------------------------------------ the end of this process

    def _end_with(self, error: BaseException) -> None:
        """Tell the others why this process ends. One whose error comes from a lost peer waits to hear which."""
        if _may_come_from_a_peer(error):
            self._stop.wait(self._patience + 3 * self._tick)  # the watching thread ends the process before that
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        self._put(f"ended/{self._index}", words)
        self._stop.set()
        _catch_abort(None)
        end_at_once()

    def _lost(self, process: int, why: str) -> None:
        """Say which process is lost, and end this one."""
        with self._lock:  # only one of the threads gets to say it
            who = f"process {process} ({self._names.get(process, 'it never said where it runs')})"
            message = f"{who} {why}; this is process {self._index} and cannot go on without it"
            if self._index == 0:
                self._put("lost", json.dumps([process, why]))
                self._hear_the_others_end()
            _say(f"{message}. Run the same command again on all hosts: it {self._goes_on}")
            self._leave(int(ExitCode.PEER_LOST))

    def _hear_the_others_end(self) -> None:
        """Process 0 holds the store: it stays until the others have read why."""
        time.sleep(min(_LINGER, 3 * self._tick))

    def _aborted(self) -> None:
        """JAX ends this process: because of process 0 if nobody listens at its address any more."""
        if self._index and not _listens(self._address):
            self._lost(0, "which coordinates the others is gone")

    # ------------------------------------------------------------------ two threads

    def _talk(self) -> None:
        """Tell that this process lives, and read who does not. A call hangs where process 0 is frozen."""
        count, judge = 0, Judge(self._patience, time.monotonic())
        while not self._stop.wait(self._tick):
            count += 1
            try:
                self._put(f"alive/{self._index}", str(count), or_raise=True)
                self._read_names()
                lost = self._judged(judge) if self._index == 0 else self._verdict(judge)
            except jax.errors.JaxRuntimeError:
                continue
            self._answered = time.monotonic()
            if lost is not None:
                self._lost(*lost)

    def _look(self) -> None:
        """Find out that process 0 no longer answers."""
        while not self._stop.wait(self._tick):
            silent = time.monotonic() - self._answered
            if silent > self._patience and self._index:
                self._lost(0, f"which coordinates the others has not answered for {silent:.0f} s")

    def _judged(self, judge: Judge) -> tuple[int, str] | None:
        """Process 0's judgement of all others."""
        now, ended = time.monotonic(), self._read("ended")
        for process, count in self._read("alive").items():
            judge.hear(process, count, now)
        for process in range(1, self._count):
            if ended.get(process):
                return process, f"has ended with {ended[process]}"
            if process not in ended and (silent := judge.silent(process, now)) is not None:
                return process, f"has not been heard of for {silent:.0f} s: it is gone or frozen"
        return None

    def _verdict(self, judge: Judge) -> tuple[int, str] | None:
        """What process 0 has judged, and whether it lives itself."""
        found = self._try("lost")
        if found is not None:
            process, why = json.loads(found)
            return None if process == self._index else (process, why)
        ended, now = self._try("ended/0"), time.monotonic()
        if ended:
            return 0, f"has ended with {ended}"
        if ended is None:
            judge.hear(0, self._try("alive/0") or "", now)
            if (silent := judge.silent(0, now)) is not None:
                return 0, f"has not been heard of for {silent:.0f} s: it is frozen"
        return None

    # ------------------------------------------------------------------ the store

    def _read_names(self) -> None:
        if len(self._names) < self._count:
            self._names = self._read("name")

    def _put(self, key: str, value: str, or_raise: bool = False) -> None:
        try:
            self._client.key_value_set(f"{self._folder}/{key}", value, allow_overwrite=True)
        except jax.errors.JaxRuntimeError:
            if or_raise:
                raise

    def _read(self, folder: str) -> dict[int, str]:
        pairs = self._client.key_value_dir_get(f"{self._folder}/{folder}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in pairs}

    def _try(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(f"{self._folder}/{key}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise


@contextlib.contextmanager
def joining(address: str | None, index: int | None, seconds: int) -> Iterator[None]:
    """While it is entered, JAX's abort() where not all processes came becomes a line and exit code PEER_LOST."""

    def gave_up() -> None:
        who = "this process" if index is None else f"process {index}"
        there = "" if index == 0 or address is None else f"; {address} {_describe(address)}"
        _say(f"{who} waited {seconds} s (distributed.start_seconds) and not all processes came{there}")
        os._exit(ExitCode.PEER_LOST)

    _catch_abort(gave_up)
    try:
        yield
    finally:
        _catch_abort(None)


def _describe(address: str) -> str:
    return "answers: another process is missing" if _listens(address) else "does not answer: process 0 is missing"


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # a log on a full disk must not keep the process alive
        print(f"\nringjax: error: {message}", file=sys.stderr, flush=True)


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise this one after the same step, and end together."""
    from ringjax.training.stops import BadLoss, Preempted
    from ringjax.training.task import DataEnded
    from ringjax.training.yaml_tree import ConfigError

    return isinstance(error, (Preempted, BadLoss, DataEnded, ConfigError))


def _may_come_from_a_peer(error: BaseException) -> bool:
    """Whether this may be what a collective raises where another process is gone. Its type depends on the call."""
    return any(re.search(_OF_COLLECTIVES, str(one), re.IGNORECASE) for one in chain(error))


_alone = threading.Event()
_handler: Any = None


def end_at_once() -> None:
    """From now on `leave` waits for nobody: neither for other processes nor for threads."""
    _alone.set()


def leave(code: int) -> int:
    """`code`, for a process whose others end as it does; one that ends alone is gone at once.

    At a usual end JAX waits for all processes, and would wait for those that this one's error has ended.
    """
    if not _alone.is_set():
        return code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if jax.process_count() > 1 and jax.process_index() == 0:
        time.sleep(_LINGER)  # it holds the store from which the others read its last words
    os._exit(code)


def _catch_abort(act: Callable[[], None] | None) -> None:
    """Call `act` when the process aborts, None: no longer.

    JAX (0.10 to 0.12) ends a process by abort() where the coordinator is gone. Its callback for that can't be used: it
    raises std::bad_cast in C++. An abort that `act` returns from goes on.
    """
    global _handler
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    before, _handler = _handler, None if act is None else kind(lambda _: act())
    to_c = ctypes.CDLL(None).signal
    to_c.restype, to_c.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    to_c(signal.SIGABRT, None if _handler is None else ctypes.cast(_handler, ctypes.c_void_p))
    del before  # C no longer has it
