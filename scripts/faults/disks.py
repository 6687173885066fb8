"""Disks that are full, read-only, limited or slow. Mounts need root; without it these kinds use `ulimit -f`."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from faults.lab import STEPS, Kind, Lab, Outcome, main, require, steps_done, whole
from ringjax.exit_codes import ExitCode
from ringjax.training import checkpoint


def _mount(*arguments: str | Path) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@contextlib.contextmanager
def _small_disk(place: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of that size; False: it may not be mounted here."""
    place.mkdir()
    mounted = _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def _file_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def disk_full(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    place = folder / "disk"
    with _small_disk(place, rng.randint(40, 2500)) as mounted:
        if not mounted:
            return _without_mounts(lab, rng, folder)
        run = place / "run"
        ended = lab.train(run, "--checkpoint.every", "1", "--checkpoint.asynchronous", rng.choice(["true", "false"]))
        if ended.code == ExitCode.FINISHED:
            lab.require_same(run)
            return Outcome("it was large enough")
        ended.require(ExitCode.DISK)
        words = ("is full", "No space left")
        require(any(word in ended.printed for word in words), f"the disk is not named: {ended.printed[-300:]}")
        before, done = whole(run), steps_done(run) if run.exists() else 0
        where = "in a save" if "saving a checkpoint" in ended.printed else "in another file"
        require(_mount("-o", "remount,size=100m", place), "cannot remount")
        lab.require_resumed(run, before)
    return Outcome(f"exit 74, full {where}", f"after {done} steps, {len(before)} whole checkpoints")


def file_limit(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    run = lab.copy_half(folder / "run")
    before = whole(run)
    with _file_limit(rng.choice([0, 100, 3000, 6000, 20_000, 30_000])):
        ended = lab.train(run).require(ExitCode.DISK)
    require("larger" in ended.printed, f"the limit is not named: {ended.printed[-300:]}")
    lab.require_resumed(run, before)
    return Outcome("exit 74", ended.printed.splitlines()[-1][:120])


def _without_mounts(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    found = file_limit(lab, rng, folder)
    return Outcome("no mounts here: `ulimit -f` in its place, exit 74", found.detail)


def disk_readonly(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """From the start, or from a random step on (the checkpoints' folder: a mount with open files cannot be changed)."""
    run, late = folder / "disk" / "run", rng.random() < 0.6
    with _small_disk(folder / "disk", 100_000) as mounted:
        if not mounted:
            return _without_mounts(lab, rng, folder)
        if not late:
            lab.copy_half(run)
            before = whole(run)
            require(_mount("-o", "remount,ro", folder / "disk"), "cannot remount")
            lab.train(run).require(ExitCode.DISK, "ead-only")
            require(whole(run) == before, "something changed on a read-only disk")
            require(_mount("-o", "remount,rw", folder / "disk"), "cannot remount")
            lab.require_resumed(run, before)
            return Outcome("exit 74 at the start")
        checkpoints = run / "checkpoints"
        checkpoints.mkdir(parents=True)
        require(_mount("--bind", checkpoints, checkpoints), "cannot bind")
        steps, stop = rng.randint(1, STEPS - 4), threading.Event()

        def turn() -> None:
            while not stop.is_set() and (steps_done(run) < steps or not _mount("-o", "remount,bind,ro", checkpoints)):
                time.sleep(0.001)

        thread = threading.Thread(target=turn)
        thread.start()
        ended = lab.train(run, "--checkpoint.every", "1")
        stop.set()
        thread.join()
        before = whole(run)
        subprocess.run(["umount", "-l", checkpoints], check=True)
        if ended.code == ExitCode.FINISHED:
            lab.require_same(run)
            return Outcome("the last save was done already")
        ended.require(ExitCode.DISK, "read-only")
        lab.require_resumed(run, before)
    return Outcome("exit 74 in a save", f"read-only from step {steps} on")


@contextlib.contextmanager
def _slow_disk(rng: random.Random, slowest: float) -> Iterator[None]:
    """Each file that a checkpoint is finished with takes a while."""
    real = checkpoint.write_manifest

    def slow(path: Path, info: dict) -> None:
        time.sleep(rng.random() * slowest)
        real(path, info)
        time.sleep(rng.random() * slowest / 4)

    with mock.patch.object(checkpoint, "write_manifest", slow):
        yield


def disk_slow(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    run, terminated = folder / "run", rng.random() < 0.5
    timer = threading.Timer(rng.uniform(0.5, 2.0), os.kill, (os.getpid(), signal.SIGTERM))
    with _slow_disk(rng, 0.5):
        if not terminated:
            lab.train(run).require(0)
            lab.require_same(run)
            return Outcome("training waited for its saves, exit 0")
        timer.start()
        try:
            ended = main(*lab.arguments(run))
        finally:
            timer.cancel()
    if ended.code == ExitCode.FINISHED:
        lab.require_same(run)
        return Outcome("the last step was done already")
    ended.require(ExitCode.PREEMPTED, "saved")
    lab.require_resumed(run)
    return Outcome("SIGTERM in a slow save: exit 75 after it was whole")


def tokenize_full(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    place = folder / "disk"
    size = sum(path.stat().st_size for path in lab.data.iterdir())
    with _small_disk(place, rng.randint(1, max(2, size // 1100))) as mounted:
        if not mounted:
            return Outcome("left out: may not mount here")
        command = ["tokenize", str(lab.text), *lab.tokenize_options(place / "set"), "--workers", "0"]
        ended = main(*command)
        ended.require(ExitCode.DISK)
        require(not (place / "set").exists(), "something that looks like a data set is there")
        left = shutil.disk_usage(place).used
        require(_mount("-o", "remount,size=100m", place), "cannot remount")
        main(*command).require(0)
        same = all(path.read_bytes() == (place / "set" / path.name).read_bytes() for path in lab.data.iterdir())
        require(same, "the data set is not the one of an undisturbed run")
    return Outcome("exit 74, nothing left of it", f"{left} bytes left")


KINDS = [
    Kind("disk_full", "a file system of 40 kB to 2.5 MB fills in training", disk_full, 25, 1),
    Kind("file_limit", "`ulimit -f` of 0 to 30 kB", file_limit, 8, 1),
    Kind("disk_readonly", "a disk turns read-only, before or in training", disk_readonly, 10, 1),
    Kind("disk_slow", "each checkpoint takes up to 0.6 s, half with SIGTERM", disk_slow, 8, 1),
    Kind("tokenize_full", "a file system fills in `ringjax tokenize`", tokenize_full, 8, 1),
]
