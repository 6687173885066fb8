"""What a person sees while questions are asked: a bar on a terminal, lines elsewhere."""

import contextlib
import sys
import time
from typing import Literal, Self, TextIO

from ringjax.training import distributed
from ringjax.training.progress import format_duration


class EvalProgress:
    """`total` steps, of which `done` were made by an earlier run. `kind` is auto, rich, plain or none."""

    def __init__(
        self, kind: Literal["auto", "rich", "plain", "none"], total: int, done: int = 0, stream: TextIO | None = None
    ):
        stream, kind = stream or sys.stdout, kind if distributed.is_main() else "none"
        if kind == "auto":
            kind = "rich" if stream.isatty() else "plain"
        self._stream, self._total, self._done, self._before = stream if kind == "plain" else None, total, done, done
        self._since = time.monotonic()
        self._bar = _bar(total, done) if kind == "rich" else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, where: str, found: str) -> None:
        """One more is done: where in the grid, and what was found."""
        self._done += 1
        rate = (time.monotonic() - self._since) / (self._done - self._before)
        left = format_duration(rate * (self._total - self._done))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, where=where, found=found, left=left)
        if self._stream is not None:
            with contextlib.suppress(BrokenPipeError):  # a reader that went away (`| head`)
                print(f"{self._done}/{self._total}  {where}  {found}  left {left}", file=self._stream, flush=True)


def _bar(total: int, done: int):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = ("[bold]{task.fields[where]}", "{task.fields[found]}  [cyan]left {task.fields[left]}")
    bar = Progress(TextColumn(columns[0]), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn(columns[1]))
    bar.add_task("", total=total, completed=done, where="compiling …", found="", left="?")
    return bar
