"""Two processes of one run: one is killed, frozen, or fails by itself; the other names it and ends within bounds."""

import random
import signal
import socket
import subprocess
import time
from pathlib import Path

from faults.lab import STEPS, Kind, Lab, Outcome, finished, require, steps_done, wait, whole
from ringjax.exit_codes import ExitCode

PATIENCE = 5
BOUND = PATIENCE + 6.0
"""Seconds until the other process must be gone: its patience, a few ticks, and a busy machine."""
# Sums over two processes have another order than those of one.
RTOL = 1e-4


def _start_two(lab: Lab, run: Path, folder: Path) -> tuple[list[subprocess.Popen], list[Path]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = ("--mesh.shape", "2,1,1,1", "--distributed.heartbeat_seconds", str(PATIENCE))
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    logs = [folder / f"log{i}" for i in range(2)]
    started = [
        lab.start(*lab.arguments(run, *options), log=logs[i], cache=f"_{i}", JAX_PROCESS_ID=str(i), **cluster)
        for i in range(2)
    ]
    return started, logs


def _two(lab: Lab, rng: random.Random, folder: Path):
    """Two processes that have done a random number of steps."""
    run = folder / "run"
    processes, logs = _start_two(lab, run, folder)
    steps = rng.randint(1, STEPS - 6)
    try:
        wait(processes[0], lambda: steps_done(run) >= steps)
        require(processes[0].poll() is None, f"ended by itself: {logs[0].read_text()[-500:]}")
    except BaseException:
        _end(processes)
        raise
    return run, processes, logs


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def _one_is(lab: Lab, rng: random.Random, folder: Path, what: signal.Signals) -> Outcome:
    victim = rng.randint(0, 1)
    run, processes, logs = _two(lab, rng, folder)
    try:
        begun = time.monotonic()
        processes[victim].send_signal(what)
        other = finished(processes[1 - victim], logs[1 - victim], BOUND + 30)
        seconds = time.monotonic() - begun
        if other.code == ExitCode.FINISHED:
            return Outcome("the last step was done already")
        other.require(ExitCode.PEER_LOST, f"process {victim} (", f"this is process {1 - victim}")
        require(seconds <= BOUND, f"the other took {seconds:.1f} s")
    finally:
        _end(processes)
    lab.require_resumed(run, None, RTOL)
    return Outcome(f"process {victim} named by the other: exit 69", f"within {seconds:.1f} s")


def peer_killed(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    return _one_is(lab, rng, folder, signal.SIGKILL)


def peer_frozen(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    return _one_is(lab, rng, folder, signal.SIGSTOP)


def peer_fails(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """The disk of process 0 takes no more: its own error, and its last words in the mouth of the other."""
    run, processes, logs = _two(lab, rng, folder)
    limit = rng.choice([4000, 20_000])
    try:
        subprocess.run(["prlimit", f"--pid={processes[0].pid}", f"--fsize={limit}:{limit}"], check=True)
        begun = time.monotonic()
        first, second = (finished(p, log, BOUND + 30) for p, log in zip(processes, logs))
        seconds = time.monotonic() - begun
        first.require(ExitCode.DISK, "takes no larger file")
        second.require(ExitCode.PEER_LOST, "process 0 (", "has ended with")
        require(seconds <= 2 * BOUND, f"the two took {seconds:.1f} s")  # with the steps until the next save
    finally:
        _end(processes)
    lab.require_resumed(run, whole(run), RTOL)
    return Outcome("exit 74 of the one, its error said by the other: exit 69", f"within {seconds:.1f} s")


def peers_terminated(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """SIGTERM to one of them: both save and stop after the same step."""
    run, processes, logs = _two(lab, rng, folder)
    try:
        processes[rng.randint(0, 1)].send_signal(signal.SIGTERM)
        ended = [finished(p, log, 60) for p, log in zip(processes, logs)]
    finally:
        _end(processes)
    if {e.code for e in ended} == {ExitCode.FINISHED}:
        return Outcome("the last step was done already")
    ended[0].require(ExitCode.PREEMPTED, "saved")
    require(ended[1].code == ExitCode.PREEMPTED, f"the other ended with {ended[1].code}")
    lab.require_resumed(run, None, RTOL)
    return Outcome("both saved the same step: exit 75")


KINDS = [
    Kind("peer_killed", "`kill -9` of one of two processes", peer_killed, 4, 1),
    Kind("peer_frozen", "SIGSTOP of one of two processes", peer_frozen, 4, 0),
    Kind("peer_fails", "one of two processes fails by itself (its disk)", peer_fails, 2, 0),
    Kind("peers_terminated", "SIGTERM to one of two processes", peers_terminated, 2, 0),
]
