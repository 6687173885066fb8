"""Figures of a ring: who holds which token, what travels, who works when, what it costs to send.

Each function returns a matplotlib `Figure`, which a notebook shows; `save` writes a small PNG. The figures
bring their own light card with them, so they read the same on a light and on a dark page.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ringjax.attention import layouts
from ringjax.attention.reach import Reach
from ringjax.planning import work
from ringjax.planning.card import CARD, DEVICES, INK, LINE, QUIET
from ringjax.planning.card import figure as _figure
from ringjax.planning.card import heading as _heading
from ringjax.planning.card import no_frame as _no_frame
from ringjax.planning.card import save as save
from ringjax.planning.traffic import Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORK = ("#f3efe6", "#cfe0ea", "#7fb0d0", "#2f6db3", "#173f70")
SAID = {
    "contiguous": "one piece of the sequence each",
    "striped": "every R-th token",
    "zigzag": "an early chunk and a late one",
}


def draw_layouts(seq_len: int = 16, ring_size: int = 4) -> "Figure":
    """Which token sits on which device, in each layout: the sequence above, the shards below.

    Legible up to some 64 tokens on 8 devices.
    """
    figure = _figure(10.4, 1.95 + 0.45 * ring_size)
    said = "the sequence, coloured by device, and the shard of each device"
    _heading(figure, f"Who holds which token: {seq_len} tokens on {ring_size} devices", said)
    for place, (name, order) in zip(_panels(figure, len(layouts.LAYOUTS)), layouts.LAYOUTS.items()):
        length = seq_len // ring_size
        shards = order.permute(np.arange(seq_len)[None], ring_size, 1).reshape(ring_size, length)
        owner = np.empty(seq_len, int)
        owner[shards] = np.arange(ring_size)[:, None]
        _title(place, name, SAID[name])
        _bare(place, (0, seq_len), (ring_size * 2.2 + 2.4, -0.2))
        for token in range(seq_len):
            _cell(place, token, 0, 1, 1.5, _colour(owner[token], ring_size), token if seq_len <= 16 else "")
        width = 0.75 * seq_len / length
        for device, shard in enumerate(shards):
            top = 2.5 + 2.2 * device
            place.text(0, top + 0.95, f"device {device}", color=INK, fontsize=8.5, va="center")
            for slot, token in enumerate(shard):
                left, size = seq_len / 4 + slot * width, min(10, 80 / length)
                _cell(place, left, top, width, 1.9, _colour(device, ring_size), token, size)
    return figure


def draw_ring(ring_size: int = 4) -> "Figure":
    """The hops of a ring: queries stay where they are, keys and values travel. Legible up to 8 devices."""
    figure = _figure(10.4, 0.9 + 2.65 * -(-ring_size // 4))
    said = "queries (outlined) stay, keys and values (filled) travel; every query meets every key, exactly once"
    _heading(figure, f"The ring: {ring_size} hops, {ring_size - 1} rotations", said)
    for hop, place in enumerate(_panels(figure, ring_size)):
        last = hop == ring_size - 1
        _title(place, f"hop {hop}", "attend; all keys are seen" if last else "attend, and pass K, V on", centre=True)
        _bare(place, (-1.5, 1.5), (-1.3, 1.3))
        place.set_aspect("equal")
        angles = np.pi / 2 - 2 * np.pi * (np.arange(ring_size) + 0.5) / ring_size
        if not last:
            _circle(place, angles - np.pi / ring_size)
        for device, angle in enumerate(angles):
            _station(place, np.cos(angle), np.sin(angle), device, (device - hop) % ring_size, ring_size)
    return figure


def draw_work(ring_size: int = 8, seq_len: int = 4096, reach: Reach | None = None) -> "Figure":
    """The work of each device in each hop, for each layout, and how long each hop therefore lasts.

    `reach` is `[B, T]` in ascending global order; None is a causal mask.
    """
    from matplotlib.colors import LinearSegmentedColormap

    figure = _figure(10.4, 4.9)
    said = "percent of a full block; below, the time of each hop: work (dark) and waiting for the busiest device (pale)"
    _heading(figure, f"Work under {'a causal' if reach is None else 'this'} mask on {ring_size} devices", said)
    colours = LinearSegmentedColormap.from_list("work", WORK)
    rows = 1 if reach is None else reach.behind.shape[0]
    block = rows * (seq_len // ring_size) ** 2
    grids = figure.add_gridspec(2, 3, height_ratios=(4, 1.25), hspace=0.1, wspace=0.14,
                                left=0.055, right=0.98, top=0.745, bottom=0.1)  # fmt: skip
    for column, name in enumerate(layouts.LAYOUTS):
        pairs = work.pairs(name, ring_size, seq_len, reach)
        share = pairs / block
        above, below = (figure.add_subplot(grids[row, column]) for row in (0, 1))
        above.imshow(share, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (device, hop), value in np.ndenumerate(share):
            above.text(hop, device, _percent(value), ha="center", va="center", fontsize=7.5,
                       color="white" if value > 0.6 else INK)  # fmt: skip
        _title(above, name, f"the machine is at work {work.busy(pairs):.0%} of its time")
        _grid(above, ring_size)
        above.set_xticks([])
        _hop_times(below, share)
        if column == 0:
            above.set_ylabel("device", color=INK, fontsize=9)
            below.set_ylabel("time", color=INK, fontsize=9)
        else:
            above.set_yticks([])
    return figure


def draw_traffic(named: dict[str, Traffic]) -> "Figure":
    """What each device sends in one layer, forward and backward, for some kinds of attention."""
    height = 1.4 + 0.48 * len(named)
    figure = _figure(10.4, height)
    _heading(figure, "Bytes on the wire", "what each device sends in one layer")
    place = figure.add_axes((0.24, 0.45 / height, 0.73, 0.48 * len(named) / height))
    rows = np.arange(len(named))
    parts = {
        "forward: K, V": [t.forward for t in named.values()],
        "backward: K, V again": [t.forward for t in named.values()],
        "backward: dK, dV in float32": [t.returned for t in named.values()],
    }
    left = np.zeros(len(named))
    for (label, sizes), colour in zip(parts.items(), (DEVICES[0], "#8fb6dc", DEVICES[1])):
        sizes = np.array(sizes) / 2**20
        place.barh(rows, sizes, left=left, color=colour, label=label, height=0.62)
        left += sizes
    for row, total in zip(rows, left):
        place.text(total + left.max() * 0.008, row, f"{total:,.4g} MiB", va="center", fontsize=8.5, color=INK)
    place.set_yticks(rows, named.keys(), fontsize=9, color=INK)
    place.invert_yaxis()
    place.set_xlim(0, left.max() * 1.13)
    place.set_xticks([])
    _no_frame(place)
    place.legend(loc="upper left", bbox_to_anchor=(-0.005, -0.02), ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def _panels(figure: "Figure", count: int) -> "Sequence[Axes]":
    top = 1 - 1.22 / figure.get_figheight()
    columns = min(count, 4)
    grid = figure.add_gridspec(-(-count // columns), columns, left=0.02, right=0.98, top=top,
                               bottom=0.18 / figure.get_figheight(), wspace=0.09, hspace=0.38)  # fmt: skip
    return [figure.add_subplot(grid[i // columns, i % columns]) for i in range(count)]


def _bare(place: "Axes", x: tuple[float, float], y: tuple[float, float]) -> None:
    place.set_xlim(*x)
    place.set_ylim(*y)
    place.set_axis_off()


def _title(place: "Axes", name: str, said: str, centre: bool = False) -> None:
    x, align = (0.5, "center") if centre else (0, "left")
    place.annotate(name, (x, 1), (0, 19), xycoords="axes fraction", textcoords="offset points", ha=align,
                   color=INK, fontsize=10.5, fontweight="bold")  # fmt: skip
    place.annotate(said, (x, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", ha=align,
                   color=QUIET, fontsize=9)  # fmt: skip


def _colour(device: int, ring_size: int) -> str:
    if ring_size <= len(DEVICES):
        return DEVICES[device]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["twilight_shifted"](0.1 + 0.8 * device / ring_size))


def _cell(place: "Axes", x, y, width, height, colour: str, text, size: float = 7) -> None:
    from matplotlib.patches import Rectangle

    place.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=CARD, linewidth=1.5))
    place.text(x + width / 2, y + height / 2 + 0.03, str(text), color="white", fontsize=size, ha="center",
               va="center")  # fmt: skip


def _station(place: "Axes", x: float, y: float, device: int, visiting: int, ring_size: int) -> None:
    """One device: its queries, and the keys and values that visit it."""
    from matplotlib.patches import FancyBboxPatch

    scale = min(1.0, 1.6 * np.sin(np.pi / ring_size))
    half_width, half_height = 0.5 * scale, 0.36 * scale
    halves = (-1, False, f"Q{device}", device), (0, True, f"K{visiting}\nV{visiting}", visiting)
    for left, filled, text, owner in halves:
        colour = _colour(owner, ring_size)
        corner, round_corners = (x + left * half_width, y - half_height), "round,pad=0,rounding_size=0.07"
        place.add_patch(FancyBboxPatch(
            corner, half_width, 2 * half_height, boxstyle=round_corners,
            facecolor=colour if filled else CARD, edgecolor=colour, linewidth=2, zorder=3,
        ))  # fmt: skip
        place.text(x + (left + 0.5) * half_width, y, text, ha="center", va="center", fontsize=10 * scale,
                   linespacing=1.1, fontweight="bold", color="white" if filled else colour, zorder=4)  # fmt: skip


def _circle(place: "Axes", arrows: np.ndarray) -> None:
    """The ring itself, behind the devices, with a head at each of the angles `arrows`, clockwise."""
    from matplotlib.patches import Circle

    place.add_patch(Circle((0, 0), 1, facecolor="none", edgecolor=LINE, linewidth=3, zorder=1))
    for angle in arrows:
        here, ahead = ((np.cos(a), np.sin(a)) for a in (angle + 0.04, angle - 0.12))
        head = dict(arrowstyle="-|>", mutation_scale=19 if len(arrows) <= 4 else 13, color=QUIET, linewidth=0)
        place.annotate("", ahead, here, arrowprops=head, zorder=2)


def _grid(place: "Axes", ring_size: int) -> None:
    _no_frame(place)
    edges = np.arange(ring_size + 1) - 0.5
    place.hlines(edges, -0.5, ring_size - 0.5, color=CARD, linewidth=1.2)
    place.vlines(edges, -0.5, ring_size - 0.5, color=CARD, linewidth=1.2)
    place.set_yticks(range(ring_size))


def _hop_times(place: "Axes", share: np.ndarray) -> None:
    """A bar for each hop: as long as the busiest device works, filled as far as all do on average."""
    hops = np.arange(share.shape[1])
    slowest = share.max(axis=0)
    place.bar(hops, slowest, width=0.86, facecolor=WORK[1], edgecolor="none")
    place.bar(hops, share.mean(axis=0), width=0.86, color=DEVICES[0])
    place.set_xlim(-0.5, len(hops) - 0.5)
    place.set_ylim(0, 1.05)
    _no_frame(place)
    place.set_yticks([])
    place.set_xticks(hops)
    place.set_xlabel(f"hop   ({slowest.sum():.2f} blocks of time, {share.mean(axis=0).sum():.2f} of work)",
                     color=INK, fontsize=9)  # fmt: skip


def _percent(value: float) -> str:
    return "·" if value == 0 else f"{100 * value:.0f}"
