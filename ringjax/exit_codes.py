"""Exit codes of `ringjax`, for supervisors. docs/faults.md says what to do with each.

The numbers above 64 are those of BSD's sysexits.h where it has a name for the matter; shells use 126 and up.
"""

import enum

from ringjax import disk


class ExitCode(enum.IntEnum):
    """How a command ended. Run again: PREEMPTED and PEER_LOST at once, DISK and MEMORY after a change, no others."""

    FINISHED = 0
    """All is done."""
    FAILED = 1
    """An error that none of the others describes."""
    REFUSED = 2
    """The command line or the config cannot be used; nothing ran."""
    DIVERGED = 3
    """The loss is NaN or jumped; nothing of it was saved."""
    DATA = 65
    """Data is missing, garbled, or not what it was when the run was saved (EX_DATAERR)."""
    PEER_LOST = 69
    """Another process of the run is gone or frozen (EX_UNAVAILABLE)."""
    MEMORY = 71
    """Memory did not suffice, that of the devices or the host's (EX_OSERR)."""
    DISK = 74
    """A disk is full, read-only or broken (EX_IOERR)."""
    PREEMPTED = 75
    """A signal came, the state was saved: the same command goes on (EX_TEMPFAIL)."""
    INTERRUPTED = 130
    """Interrupted from the keyboard, at once."""


def code_of(error: BaseException) -> ExitCode:
    """The exit code for an error that ends a command."""
    from ringjax.cli_options import UsageError
    from ringjax.data.errors import DataError
    from ringjax.training.out_of_memory import OutOfMemory, is_out_of_memory
    from ringjax.training.stops import BadLoss, Preempted
    from ringjax.training.tasks import DataRefused
    from ringjax.training.yaml_tree import ConfigError

    kinds = (
        (KeyboardInterrupt, ExitCode.INTERRUPTED),
        (Preempted, ExitCode.PREEMPTED),
        (BadLoss, ExitCode.DIVERGED),
        (OutOfMemory, ExitCode.MEMORY),
        ((DataError, DataRefused), ExitCode.DATA),
        ((UsageError, ConfigError, NotImplementedError), ExitCode.REFUSED),
    )
    for kind, code in kinds:
        if isinstance(error, kind):
            return code
    if disk.problem(error) is not None:
        return ExitCode.DISK
    return ExitCode.MEMORY if is_out_of_memory(error) else ExitCode.FAILED
