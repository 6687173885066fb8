"""metrics.jsonl: one line a step, whatever else is shown; and optional TensorBoard events.

    {"step": 12, "stage": "train", "loss": 3.2, "text_loss": 3.1, "vision_loss": 3.4, "grad_norm": 0.8, …}
    {"step": 12, "eval": {"sample:digits": {"loss": 3.3, …}}}

Lines are written in order, each in one move, so that a killed run leaves at most one cut line; before a checkpoint is
made they are put on the disk. A resumed run first drops what lies beyond its checkpoint: no step is missing or doubled,
and what somebody else has cut out of the file is said.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from ringjax.json_text import parse_json


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that was cut by a kill is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def truncate_metrics(path: str | Path, last_step: int) -> list[dict[str, Any]]:
    """Keep the records up to `last_step`, one of each kind a step; the file is replaced in one move.

    Returns what was kept.
    """
    path = Path(path)
    found = {(record["step"], "eval" in record): record for record in read_metrics(path)}
    kept = [record for (step, _), record in found.items() if step <= last_step]
    if path.exists():
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("".join(_line(record) for record in kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return kept


def missing_steps(records: list[dict[str, Any]], last_step: int) -> list[int]:
    """Steps up to `last_step` of which there is no record."""
    there = {record["step"] for record in records if "eval" not in record}
    return [step for step in range(1, last_step + 1) if step not in there]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a value is written as null."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Appends records to metrics.jsonl, and to TensorBoard when asked. Only process 0 has one."""

    def __init__(self, run_dir: Path, last_step: int = 0, tensorboard: bool = False):
        """Continue after `last_step`. Raises ImportError when TensorBoard is asked for and not installed."""
        self._board = _board(run_dir, last_step) if tensorboard else None
        path = run_dir / "metrics.jsonl"
        self.history = truncate_metrics(path, last_step)
        # Without a buffer: one that a full disk did not take would be written again when the file is closed.
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must have a `step`. Raises OSError where the disk does not take it."""
        line = _line(_finite(record)).encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None
        if self._board is not None:
            for name, value in _flat(record):
                self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _board(run_dir: Path, last_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "logging.tensorboard needs tensorboardx: pip install 'ringjax[tensorboard]', or set it to false"
        ) from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs = []
    for key, value in record.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "time"):
            pairs.append((f"{prefix}{key}", value))
    return pairs
