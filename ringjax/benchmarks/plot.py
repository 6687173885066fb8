"""plot.png: the rate of each way by length, one panel a mask and pass, the one-device kernel dashed."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from ringjax.benchmarks.rows import OK, Row
from ringjax.benchmarks.table import SHARE

_MARKS = "osD^vP*X"


def plot_rows(rows: Sequence[Row], path: Path, title: str) -> Path | None:
    """Draw the timed rows to `path`; None when there are none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.status == OK]
    if not rows:
        return None
    kinds = list(dict.fromkeys(row.kind for row in rows))
    masks = list(dict.fromkeys(_panel_of(row) for row in rows))
    size = 2.5 + 4.2 * len(kinds), 1.2 + 3.2 * len(masks)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(masks), len(kinds), squeeze=False)
    colours = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(_name(row) for row in rows))}
    for line, (mask, heads) in zip(panels, masks):
        for axes, kind in zip(line, kinds):
            _panel(axes, [row for row in rows if (*_panel_of(row), row.kind) == (mask, heads, kind)], colours)
            axes.set_title(f"{mask}, {heads} heads, {'forward + backward' if kind == 'both' else kind}", fontsize=9)
    handles = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels())}
    if any(row.share for row in rows):
        title += f"\n{SHARE}"
    figure.suptitle(title, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _panel(axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    unit = 1e12 if max((row.rate for row in rows), default=0) >= 1e11 else 1e9
    for index, (name, colour) in enumerate(colours.items()):
        points = sorted((row.length, row) for row in rows if _name(row) == name)
        if points:
            lengths = [length for length, _ in points]
            rates = [row.rate / unit for _, row in points]
            low = [(row.times["median"] / row.times["max"] - 1) * -row.rate / unit for _, row in points]
            high = [(row.times["median"] / row.times["min"] - 1) * row.rate / unit for _, row in points]
            axes.errorbar(lengths, rates, yerr=[low, high], marker=_MARKS[index % len(_MARKS)], markersize=5,
                          linewidth=1.4, capsize=2, color=colour, label=name)  # fmt: skip
    timed = [(row.length, row.baseline["rate"] / unit) for row in rows if row.baseline]  # once beside each row
    base = [(at, statistics.median(rate for length, rate in timed if length == at)) for at in sorted(dict(timed))]
    if base:
        axes.plot(*zip(*base), "--x", color="black", linewidth=1, label="one-device kernel")
    lengths = sorted({row.length for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(length) for length in lengths], minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("useful TFLOP/s a device" if unit == 1e12 else "useful GFLOP/s a device")
    axes.grid(alpha=0.3)


def _panel_of(row: Row) -> tuple[str, str]:
    return row.mask, f"{row.heads}/{row.kv_heads}"


def _name(row: Row) -> str:
    parts = [row.layout, row.strategy.replace("_", " ")] if row.layout else [row.strategy.replace("_", " ")]
    return " ".join([*parts, "" if row.backend == "auto" else row.backend]).strip()


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
