"""What a person sees while a run goes on: a rich display on a terminal, plain lines elsewhere, one process only."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, TextIO

Words = Callable[[dict[str, Any]], str]
_SPEEDS = ("tokens_per_second", "pictures_per_second", "mfu")


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3723 -> "1:02:03"."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def format_count(number: float) -> str:
    """A short number: 20600 -> "20.6k"."""
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e3, "k")):
        if number >= limit:
            return f"{number / divisor:.3g}{unit}"
    return f"{number:.3g}"


def describe(record: dict[str, Any]) -> str:
    """The measurements of a record in words: "loss 3.214  text 3.1  pictures 3.4  12.3k tok/s  MFU 41.2 %"."""
    parts = [f"loss {record['loss']:.4f}"] if record.get("loss") is not None else ["loss -"]
    for key, label in (("text_loss", "text"), ("vision_loss", "pictures")):
        if record.get(key) is not None:
            parts.append(f"{label} {record[key]:.4f}")
    if record.get("grad_norm") is not None:
        parts.append(f"grad {record['grad_norm']:.3g}")
    if record.get("tokens_per_second"):
        parts.append(f"{format_count(record['tokens_per_second'])} tok/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    return "  ".join(parts)


class Quiet:
    """Shows nothing: the display of every process but the first."""

    def step(self, record: dict[str, Any]) -> None:
        """A step is done."""

    def say(self, message: str) -> None:
        """A line that is worth reading."""

    def start_stage(self, name: str, done: int, steps: int) -> None:
        """A stage begins (or goes on) at step `done` of `steps`."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainLines(Quiet):
    """One line every few steps, for files and pipes."""

    def __init__(self, every: int, stream: TextIO | None = None, words: Words = describe):
        self._every, self._stream, self._words = every, stream or sys.stdout, words
        self._left, self._speeds = _TimeLeft(), _Speeds(every)
        self._stage, self._steps = "", 0

    def start_stage(self, name: str, done: int, steps: int) -> None:
        self._stage, self._steps = name, steps
        self._left.restart(done, steps)
        self._speeds.restart()

    def step(self, record: dict[str, Any]) -> None:
        done = record["stage_step"]
        left, record = self._left.after(done), self._speeds.over_last(record)
        if done % self._every == 0 or done in (1, self._steps):
            self.say(f"{self._stage} {done}/{self._steps}  {self._words(record)}  left {left}")

    def say(self, message: str) -> None:
        # A reader that went away (`| head`) is no reason to stop training.
        with contextlib.suppress(BrokenPipeError):
            print(message, file=self._stream, flush=True)


class RichDisplay(Quiet):
    """A bar and the newest measurements, redrawn in place."""

    def __init__(self, console=None, words: Words = describe):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}  [cyan]left {task.fields[left]}"),
            console=console,
        )
        self._left, self._speeds, self._words = _TimeLeft(), _Speeds(20), words
        self._task = None
        self._progress.start()

    def start_stage(self, name: str, done: int, steps: int) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._left.restart(done, steps)
        self._speeds.restart()
        self._task = self._progress.add_task(name, total=steps, completed=done, measured="compiling …", left="?")

    def step(self, record: dict[str, Any]) -> None:
        done, record = record["stage_step"], self._speeds.over_last(record)
        self._progress.update(self._task, completed=done, measured=self._words(record), left=self._left.after(done))

    def say(self, message: str) -> None:
        from rich.text import Text

        self._progress.console.print(Text(message))

    def close(self) -> None:
        self._progress.stop()


class _Speeds:
    """Speeds over the last steps: one step alone is measured between two looks at the devices, and jumps."""

    def __init__(self, steps: int):
        self._steps: collections.deque[tuple[float, dict[str, float]]] = collections.deque(maxlen=max(1, steps))

    def restart(self) -> None:
        """A stage begins, whose steps take another time."""
        self._steps.clear()

    def over_last(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with its speeds as means over the last steps; a step without a time counts for nothing."""
        if not record.get("seconds"):
            return record
        # What a step did differs as well, where rows are not full: sums over sums, not this step's over a mean time.
        done = {name: record[name] * record["seconds"] for name in _SPEEDS if record.get(name) is not None}
        self._steps.append((record["seconds"], done))
        seconds = sum(seconds for seconds, _ in self._steps)
        return record | {name: sum(done.get(name, 0.0) for _, done in self._steps) / seconds for name in done}


class _TimeLeft:
    """Seconds to the end of a stage, from the steps after the first (which compiles)."""

    def restart(self, done: int, steps: int) -> None:
        self._steps, self._first, self._since = steps, done + 1, None

    def after(self, done: int) -> str:
        if self._since is None:
            self._since = time.monotonic()
            return "?" if done < self._steps else "0:00"
        rate = (time.monotonic() - self._since) / max(1, done - self._first)
        return format_duration(rate * (self._steps - done))


def make_display(
    kind: Literal["auto", "rich", "plain", "none"], every: int, is_main: bool = True, words: Words = describe
) -> Quiet:
    """The display for this process: `auto` is rich on a terminal and plain elsewhere; `words` describes a record."""
    if not is_main or kind == "none":
        return Quiet()
    if kind == "rich" or (kind == "auto" and sys.stdout.isatty()):
        return RichDisplay(words=words)
    return PlainLines(every, words=words)
