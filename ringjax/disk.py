"""Faults of a disk, told from other errors, and what is free on it."""

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_NUMBERS = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "has no quota left",
    errno.EFBIG: "takes no larger file (ulimit -f)",
    errno.EROFS: "is read-only",
    errno.EIO: "fails (input/output error)",
}
# Libraries in C++ tell the number only in words.
_WORDS = {
    r"no space left|ENOSPC": errno.ENOSPC,
    r"quota exceeded|EDQUOT": errno.EDQUOT,
    r"file too large|EFBIG": errno.EFBIG,
    r"read-only file system|EROFS": errno.EROFS,
    r"input/output error|\bEIO\b": errno.EIO,
}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the last first."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def problem(error: BaseException) -> str | None:
    """What is wrong with the disk ("is full"), where that is what an error is about."""
    for one in chain(error):
        if isinstance(one, OSError) and one.errno in _NUMBERS:
            return _NUMBERS[one.errno]
        for words, number in _WORDS.items():
            if re.search(words, str(one), re.IGNORECASE):
                return _NUMBERS[number]
    return None


def named(error: BaseException) -> str | None:
    """The file that an error names."""
    return next((str(one.filename) for one in chain(error) if isinstance(one, OSError) and one.filename), None)


def free(folder: Path) -> str:
    """Bytes free on the disk of a folder, in words."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return f"{megabytes(usage.free)} free of {megabytes(usage.total)}"


def megabytes(count: float) -> str:
    """4_500_000 -> "4.5 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
