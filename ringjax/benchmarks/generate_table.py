"""What `ringjax bench generate` found, as tables and as the picture of Flash-Decoding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringjax.benchmarks.generate import Result, Split, TokenProfile
from ringjax.benchmarks.memory import gib

COLUMNS = (
    "model", "", "tokens", "time", "tokens/s", "MFU", "of the memory's rate", "peak memory", "transformers", "speed-up"
)  # fmt: skip


def cells(result: Result, peers: Sequence[dict[str, Any]]) -> list[str]:
    """A line of the table."""
    prefill = result.kind == "prefill"
    what, count = ("reads", result.context) if prefill else ("writes after", 1)
    peer = next((p for p in peers if (p["size"], p["context"]) == (result.size, result.context)), None)
    beside, gain = "–", "–"
    if peer is not None and "error" in peer:
        beside = peer["error"][:60]
    elif peer is not None:
        seconds = peer["prefill" if prefill else "token"]
        beside, gain = _time(seconds), f"{seconds / result.median:.1f}×"
    return [
        result.size, what, str(result.context), _time(result.median), f"{count / result.median:,.0f}",
        _percent(result.mfu), _percent(result.share), gib(result.peak_bytes), beside, gain,
    ]  # fmt: skip


def split_cells(split: Split) -> list[str]:
    """A line of the table of splits."""
    times = (split.split, split.unsplit, split.xla)
    rates = ["–" if t is None else f"{1e6 * t:.1f} µs ({split.bytes_read / t / 1e12:.2f} TB/s)" for t in times]
    return [split.size, str(split.context), *rates, f"{split.error:.1e}"]


SPLIT_COLUMNS = "model", "context", "split", "one block a head", "XLA's products", "error"


def profile_lines(found: TokenProfile) -> list[str]:
    """Where a token's time goes, as Markdown."""
    return [f"## {found.size}: where a token's time goes after {found.context}", "", *found.profile.lines()]


def plot_splits(splits: Sequence[Split], path: Path, title: str) -> None:
    """Time of one layer's attention against context."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    sizes = list(dict.fromkeys(split.size for split in splits))
    figure = Figure(figsize=(1.5 + 4.5 * len(sizes), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes):
        own = [split for split in splits if split.size == size]
        for name, label in (("split", "keys split"), ("unsplit", "one block a head"), ("xla", "XLA's products")):
            points = [(s.context, 1e6 * getattr(s, name)) for s in own if getattr(s, name) is not None]
            if points:
                axes.plot(*zip(*points), marker="o", markersize=4, label=label)
        axes.set(yscale="log", xlabel="tokens in the cache", ylabel="µs a token and layer", title=size)
        axes.set_xscale("log", base=2)
        axes.set_xticks([split.context for split in own], [f"{split.context / 1024:g}K" for split in own])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
