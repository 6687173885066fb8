"""Each fault has its exit code, and docs/faults.md has them all."""

import errno
import re
from pathlib import Path

import jax
import pytest

from ringjax import disk
from ringjax.cli_options import UsageError
from ringjax.data.errors import DataError, MissingShard
from ringjax.exit_codes import ExitCode, code_of
from ringjax.training.checkpoint import CheckpointError, DiskError
from ringjax.training.out_of_memory import OutOfMemory
from ringjax.training.stops import BadLoss, Preempted
from ringjax.training.tasks import DataRefused
from ringjax.training.yaml_tree import ConfigError


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, code",
    [
        (RuntimeError("anything"), 1),
        (CheckpointError("of another model"), 1),
        (ConfigError("no such key"), 2),
        (UsageError("no such option"), 2),
        (NotImplementedError("cannot"), 2),
        (BadLoss("nan"), 3),
        (DataError("garbled"), 65),
        (MissingShard("shard 0 is missing"), 65),
        (DataRefused("cut"), 65),
        (OutOfMemory("too large"), 71),
        (MemoryError(), 71),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes"), 71),
        (jax.errors.JaxRuntimeError("INTERNAL: something else"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
        (OSError(errno.EROFS, "Read-only file system"), 74),
        (OSError(errno.EFBIG, "File too large"), 74),
        (FileNotFoundError(errno.ENOENT, "no such file"), 1),
        (caused(DiskError("saving failed"), RuntimeError("tensorstore: No space left on device")), 74),
        (Preempted("saved"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_code_of(error, code):
    assert code_of(error) == code


def test_the_guide_has_every_code():
    text = (Path(__file__).parents[1] / "docs" / "faults.md").read_text()
    assert re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", text, re.M) == [(str(int(c)), c.name) for c in ExitCode]


def test_what_is_wrong_with_a_disk():
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert disk.problem(caused(RuntimeError("x"), full)) == "is full"
    assert disk.named(caused(ValueError(), full)) == "/a/b"
    assert disk.problem(RuntimeError("[Errno 30] Read-only file system")) == "is read-only"
    assert disk.problem(RuntimeError("a file")) is None
    assert re.fullmatch(r"[\d.]+ [MG]B free of [\d.]+ [MG]B", disk.free(Path("/nowhere/at/all")))
