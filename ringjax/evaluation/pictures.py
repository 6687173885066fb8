"""The pictures of an evaluation: LWM's heat map, accuracy by length, loss by position."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ringjax.evaluation.summary import Record, by_bucket, grid, summarise

# The colours of LWM's figure: nothing found, half, all.
COLOURS = ("#F0496E", "#EBB839", "#0CD79F")


def draw(folder: Path, records: Sequence[Record], title: str) -> list[Path]:
    """All pictures that these records give, as PNG files."""
    if "losses" in records[0]:
        return [draw_losses(folder / "loss.png", records, title)]
    drawn = [draw_heat_map(folder / "heat_map.png", records, title)]
    if len({record["length"] for record in records}) > 1:
        drawn.append(draw_lines(folder / "accuracy.png", records, title))
    return drawn


def draw_heat_map(path: Path, records: Sequence[Record], title: str) -> Path:
    """Context length across, depth (or task) down, a map a method, red for 0 to green for 1."""
    from matplotlib.colors import LinearSegmentedColormap

    methods = list(dict.fromkeys(record["method"] for record in records))
    deep = all(record["depth"] is not None for record in records)
    row = "depth" if deep else "part"
    grids = [grid([r for r in records if r["method"] == name], row) for name in methods]
    across = min(len(methods), 3)
    down = math.ceil(len(methods) / across)
    lengths, rows = (max(len(found[i]) for found in grids) for i in (1, 0))
    width, height = across * (2.4 + 0.75 * lengths), down * (1.6 + 0.42 * rows)
    figure = new_figure(max(width, 5), max(height, 3))
    colours = LinearSegmentedColormap.from_list("needle", COLOURS)
    places = figure.subplots(down, across, squeeze=False).ravel()
    for axes, method, found in zip(places, methods, grids):
        image = _draw_map(axes, method, *found, colours, deep)
    for axes in places[len(methods) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=list(places), label="score", shrink=0.8)
    return save_figure(figure, path, title)


def _draw_map(axes, method: str, rows: list, lengths: list[int], values: np.ndarray, colours, deep: bool):
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths], rotation=45)
    axes.set_yticks(range(len(rows)), [f"{row:g} %" if deep else row for row in rows])
    axes.set_xlabel("context length")
    axes.set_ylabel("depth" if deep else "")
    axes.set_title(method, fontsize=10)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7)
    return image


def draw_lines(path: Path, records: Sequence[Record], title: str) -> Path:
    """Mean score over the context length, a line a method."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for method in dict.fromkeys(record["method"] for record in records):
        lines = summarise({**record, "part": ""} for record in records if record["method"] == method)
        axes.plot([line.length for line in lines], [line.score for line in lines], "o-", label=method)
    lengths = sorted({record["length"] for record in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="context length", ylabel="score", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, path, title)


def draw_losses(path: Path, records: Sequence[Record], title: str) -> Path:
    """Mean loss of a token over its position, a line a method and length."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record["method"], record["length"]), []).append(record)
    for (method, length), group in groups.items():
        losses = by_bucket(group)
        middles = (np.arange(len(losses)) + 0.5) * length / len(losses)
        points = [(place, loss) for place, loss in zip(middles, losses) if loss is not None]
        axes.plot(*zip(*points), "o-", markersize=3, label=f"{method}, {short(length)}")
    axes.set(xlabel="position in the context", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, path, title)


def short(length: int) -> str:
    """8192 -> "8K", 8064 -> "7.88K", 1048576 -> "1M", 8000 -> "8000"."""
    if length % 1000 == 0:
        return str(length)
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length >= size:
            return f"{length / size:.3g}{unit}"
    return str(length)


def new_figure(width: float, height: float):
    """An empty figure, by the object interface: pyplot has global state and wants a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: Path, title: str) -> Path:
    """Writes a figure under its title."""
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    return path
