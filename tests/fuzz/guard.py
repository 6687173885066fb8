"""Running a reader on one input, watched: what it raises, how long it takes, what memory, which files, which calls."""

import gc
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.worker import CANARY

SECONDS = int(os.environ.get("RINGJAX_FUZZ_SECONDS", 8))
"""Of processor time that an input may take; most take milliseconds."""
PATIENCE = 10
"""By how much longer it may wait, on a machine that others use too."""
MEMORY = 1 << 30
"""Bytes by which resident memory may grow while one input is read."""
ADDRESSES = 6 << 30
"""Bytes of address space beyond what the libraries take when they are loaded: more is refused by the system."""
_RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
    "socket.bind",
    "ctypes.dlopen",
    "urllib.Request",
    "webbrowser.open",
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "shutil.move",
    "shutil.rmtree",
    "shutil.copyfile",
)


class Slow(BaseException):
    """Raised by the alarm; no reader catches it."""


class Verdict(NamedTuple):
    """What became of an input: accepted, refused, or a kind of finding with its details."""

    kind: str
    signature: str = ""
    details: str = ""

    @property
    def passed(self) -> bool:
        return self.kind in ("accepted", "refused")


class Guard:
    """Watches this process: files outside `folder` and the libraries, programs that are started, memory and time."""

    def __init__(self, folder: Path):
        self.folder, self.watching, self.seen = Path(folder).resolve(), False, []
        package = Path(__file__).resolve().parents[2]
        self._readable = tuple(
            map(
                str,
                {
                    self.folder,
                    Path(sys.prefix).resolve(),
                    Path(sys.base_prefix).resolve(),
                    package / "ringjax",
                    package / "tests",
                    Path("/proc"),
                    Path("/sys"),
                    Path("/dev"),
                    Path(os.__file__).resolve().parent,
                },
            )
        )
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._alarm)

    def limit_addresses(self) -> None:
        """Refuse this process memory far beyond what it has now."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def run(
        self, read: Callable[[Path], object], case: Path, errors: tuple[type, ...], names: tuple[str, ...]
    ) -> Verdict:
        """The verdict on one input in the folder `case`; an error must be one of `errors` and name one of `names`."""
        self.seen, before = [], self._reset_peak()
        try:
            caught = self._caught(read, case)
        except Slow:  # the alarm rang while it was being switched off
            caught = Slow()
        self.watching = False
        grown = _peak() - before
        if self.seen:
            return Verdict(
                "outside", f"{self.seen[0][0]} {self.seen[0][1][:60]} {_ours(self.seen[0][2])}", f"{self.seen[0]}"
            )
        if (self.folder / CANARY).exists() or (case / CANARY).exists():
            return Verdict("ran", "the canary file is there", "")
        if grown > MEMORY:
            return Verdict(
                "memory", "grew by over 1 GiB", f"{grown >> 20} MiB; {type(caught).__name__}: {str(caught)[:200]}"
            )
        if isinstance(caught, Slow):  # last: it may be slow because of any of the others
            return Verdict("slow", f"over {SECONDS} s", "")
        return _judged(caught, errors, names)

    def _caught(self, read: Callable[[Path], object], case: Path) -> BaseException | None:
        """What the reader raises."""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            self.watching = True
            read(case)
            return None
        except BaseException as error:
            return error
        finally:
            self.watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _alarm(self, *_) -> None:
        raise Slow

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self.watching:
            return
        if event in _RUNS:
            self.seen.append((event, str(arguments)[:200], traceback.extract_stack()))
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self._check(event, path, (str(self.folder), "/dev", "/proc") if writes else self._readable)
        elif event in _CHANGES:
            self._check(event, arguments[0], (str(self.folder),))

    def _check(self, event: str, path: str | bytes, allowed: tuple[str, ...]) -> None:
        text = os.path.realpath(os.fsdecode(path))
        if text.endswith((".pyc", ".py", ".pyx")) or "__pycache__" in text:
            return
        if not any(text == folder or text.startswith(folder + os.sep) for folder in allowed):
            self.seen.append((event, text[:200], traceback.extract_stack()))

    def _reset_peak(self) -> int:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak()


def _peak() -> int:
    """The largest resident memory since it was reset."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0


def _judged(caught: BaseException | None, errors: tuple[type, ...], names: tuple[str, ...]) -> Verdict:
    if caught is None:
        return Verdict("accepted")
    try:
        text = str(caught)
        text.encode("utf-8", "surrogatepass")
    except Exception as error:
        return Verdict("error", f"{type(error).__name__} while the message is made", "")
    stack = traceback.extract_tb(caught.__traceback__)
    details = "".join(traceback.format_exception(caught, limit=-6))[-3000:]
    if isinstance(caught, MemoryError):
        return Verdict("memory", f"MemoryError {_ours(stack)}", details)
    if type(caught) not in errors:
        return Verdict("error", f"{type(caught).__name__} {_ours(stack)}", details)
    if not any(name in text for name in names):
        return Verdict("unnamed", f"{type(caught).__name__} {_ours(stack)}", details)
    if len(text) > 10_000:
        return Verdict(
            "message",
            f"{type(caught).__name__} of {len(text) // 10_000}0,000 characters {_ours(stack)}",
            details[-500:],
        )
    return Verdict("refused")


def _ours(stack) -> str:
    """The innermost line of the library in a traceback."""
    for frame in reversed(stack):
        if f"{os.sep}ringjax{os.sep}" in frame.filename and "tests" not in frame.filename:
            return f"{frame.filename.rsplit(f'{os.sep}ringjax{os.sep}', 1)[-1]}:{frame.lineno}"
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""


def settle() -> None:
    """Give back what the last input held."""
    gc.collect()
