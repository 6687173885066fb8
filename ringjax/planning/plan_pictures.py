"""Figures of a plan: how FLOPs grow with the context, what memory is for, what a step waits for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ringjax.planning import card, flops
from ringjax.planning.card import DEVICES, INK, LINE, QUIET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ringjax.planning.plan import StagePlan

GIB = 2**30


def draw_flops_ratio(
    shapes: Sequence[flops.Shape] = flops.FAMILY, contexts: Sequence[int] = flops.CONTEXTS, base: int = 4096
) -> "Figure":
    """How many times as much training a token costs at each context as at `base`, for models from 1B to 1T."""
    drawing = card.figure(10.4, 4.6)
    said = "6·P + 6·L·N·H·T FLOPs a token: the wider a model, the less its context costs beside its parameters"
    card.heading(drawing, f"What a context costs: training FLOPs a token, times those at {base // 1024}K", said)
    place = drawing.add_axes((0.07, 0.13, 0.9, 0.66))
    width = 0.85 / len(shapes)
    for index, shape in enumerate(shapes):
        ratios = [flops.ratio(shape, context, base) for context in contexts]
        at = np.arange(len(contexts)) + (index - (len(shapes) - 1) / 2) * width
        place.bar(at, ratios, width=0.92 * width, color=DEVICES[index % len(DEVICES)], label=shape.name)
        for x, value in zip(at, ratios):
            place.text(x, value * 1.06, f"{value:.3g}", ha="center", va="bottom", fontsize=5.6, color=INK, rotation=90)
    card.no_frame(place)
    place.set_yscale("log")
    place.set_ylim(0.8, 4 * place.get_ylim()[1])
    place.set_xticks(range(len(contexts)), [_length(context) for context in contexts], fontsize=9, color=INK)
    place.legend(loc="upper left", ncols=len(shapes), frameon=False, fontsize=8.5, labelcolor=INK)
    return drawing


def draw_memory(plans: Sequence["StagePlan"]) -> "Figure":
    """The bytes of a device at the fullest moment of each stage's step, beside what it has."""
    rows = {plan.stage.name: {kind: size / GIB for kind, size in plan.memory.parts().items()} for plan in plans}
    device = plans[0].target.device
    said = f"GiB on each of {plans[0].target.count} × {device.kind}; the line is what a program may use"
    drawing = _bars("What memory is for", said, rows, "{:.1f} GiB", limit=device.usable / GIB)
    place = drawing.axes[0]
    for row, plan in enumerate(plans):
        if plan.compiled is not None:
            place.plot([plan.compiled.used / GIB] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=2)
            place.text(plan.compiled.used / GIB, row - 0.38, "compiler", ha="center", fontsize=6.5, color=INK)
    return drawing


def draw_time(plans: Sequence["StagePlan"]) -> "Figure":
    """What the step of each stage spends its time on, in percent."""
    rows = {
        f"{plan.stage.name} ({plan.time.mfu:.0%} MFU)": {
            kind: 100 * value / plan.time.seconds for kind, value in plan.time.parts().items() if value
        }
        for plan in plans
    }
    return _bars("What a step spends its time on", "percent of each stage's step", rows, None)


def _bars(
    title: str, said: str, rows: Mapping[str, Mapping[str, float]], total: str | None, limit: float | None = None
) -> "Figure":
    """A stacked bar a row; a kind has the same colour in all."""
    height = 1.55 + 0.48 * len(rows)
    drawing = card.figure(10.4, height)
    card.heading(drawing, title, said)
    place = drawing.add_axes((0.17, 0.6 / height, 0.79, 0.48 * len(rows) / height))
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind in parts))
    left, at = np.zeros(len(rows)), np.arange(len(rows))
    for index, kind in enumerate(kinds):
        sizes = np.array([parts.get(kind, 0.0) for parts in rows.values()])
        place.barh(at, sizes, left=left, height=0.62, color=DEVICES[index % len(DEVICES)], label=kind)
        left += sizes
    if total is not None:
        for row, value in enumerate(left):
            place.text(value + left.max() * 0.01, row, total.format(value), va="center", fontsize=8.5, color=INK)
    if limit is not None:
        place.axvline(limit, color=QUIET, linewidth=1.5, linestyle=(0, (4, 2)))
    place.set_yticks(at, list(rows), fontsize=9, color=INK)
    place.invert_yaxis()
    card.no_frame(place)
    place.tick_params(axis="x", color=LINE)
    place.set_xlim(0, max(left.max(), limit or 0) * 1.12)
    place.legend(
        loc="upper left", bbox_to_anchor=(-0.15, -0.3 / len(rows)), ncols=len(kinds), frameon=False, fontsize=8.5,
        labelcolor=INK, columnspacing=1.2, handlelength=1.2,
    )  # fmt: skip
    return drawing


def _length(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens % 2**20 == 0 else f"{tokens // 2**10}K"
