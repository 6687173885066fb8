"""loss.png: the loss of each modality over the steps, with the held-out losses on top."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ringjax.training.metrics import read_metrics

_LINES = (("text_loss", "text", "tab:blue"), ("vision_loss", "pictures", "tab:orange"))  # key, label, colour
_MARKS = "osD^vP*X"


def plot_loss(
    run_dir: str | Path,
    title: str = "",
    lines: Sequence[tuple[str, str, str]] = _LINES,
    label: str = "loss (nats a token)",
) -> Path:
    """Draw `run_dir`/metrics.jsonl to `run_dir`/loss.png and return its path; `label` says what the losses are."""
    # The object interface, not pyplot: no global state, no display, safe beside a notebook's own backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, name, colour in lines:
        _draw_loss(axes, records, key, name, colour)
    _draw_held_out(axes, records)
    _draw_stages(axes, records)
    axes.set_title(title or f"{Path(run_dir).name}: training loss")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path = Path(run_dir) / "loss.png"
    figure.savefig(path)
    return path


def _draw_loss(axes, records: Sequence[dict[str, Any]], key: str, label: str, colour: str) -> None:
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if not points:
        return
    steps, losses = np.array(points, dtype=float).T
    axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color=colour, linewidth=1.8, label=f"{label}: {losses[-20:].mean():.3f}")


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the last 2 % of the steps, shorter at the start."""
    window = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_held_out(axes, records: Sequence[dict[str, Any]]) -> None:
    sources: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for source, values in (record.get("eval") or {}).items():
            if values.get("loss") is not None:
                sources.setdefault(source, []).append((record["step"], values["loss"]))
    for index, (source, points) in enumerate(sources.items()):
        steps, losses = np.array(points, dtype=float).T
        axes.plot(steps, losses, _MARKS[index % len(_MARKS)], color="black", markersize=4, fillstyle="none",
                  label=f"held-out {source}: {losses[-1]:.3f}")  # fmt: skip


def _draw_stages(axes, records: Sequence[dict[str, Any]]) -> None:
    starts: dict[str, int] = {}
    for record in records:
        if "stage" in record:
            starts.setdefault(record["stage"], record["step"])
    if len(starts) > 1:
        for name, step in starts.items():
            axes.axvline(step, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(name, (step, 1), xycoords=("data", "axes fraction"), fontsize=8, va="top", rotation=90)
