"""The card that every figure is drawn on: light, with round corners, so that it reads the same on any page."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CARD, INK, QUIET, LINE = "#fbfaf7", "#22252b", "#6b7078", "#d9d6cf"
# Told apart by people with any colour vision when neighbours, and white text reads on all of them.
DEVICES = ("#2f6db3", "#c8553d", "#3c8d5f", "#8a5bb0", "#a8791b", "#1f8a99", "#b0457e", "#6a6f4a")


def save(drawing: "Figure", path: str | Path) -> Path:
    """Write a figure as a PNG of few colours: small, and the same bytes for the same figure."""
    Path(path).write_bytes(png(drawing))
    return Path(path)


def png(drawing: "Figure") -> bytes:
    """The bytes that `save` writes."""
    import io

    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    drawing.savefig(drawn, format="png", dpi=160)
    drawn.seek(0)
    image = Image.open(drawn).convert("RGBA")
    # The corners outside the card stay transparent: FASTOCTREE is the palette method that keeps alpha.
    few = image.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def figure(width: float, height: float) -> "Figure":
    """An empty card with round corners. No pyplot: no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(width, height), facecolor="none", dpi=110)
    FigureCanvasAgg(figure)
    edge, radius = 0.03, 0.16
    card = FancyBboxPatch(
        (edge + radius, edge + radius), width - 2 * (edge + radius), height - 2 * (edge + radius),
        boxstyle=f"round,pad={radius}", facecolor=CARD, edgecolor=LINE, linewidth=1,
        transform=figure.dpi_scale_trans, zorder=-10,
    )  # fmt: skip
    figure.add_artist(card)
    return figure


def heading(figure: "Figure", text: str, said: str) -> None:
    inches = figure.get_figheight()
    figure.text(0.02, 1 - 0.28 / inches, text, color=INK, fontsize=12.5, fontweight="bold", va="center")
    figure.text(0.02, 1 - 0.52 / inches, said, color=QUIET, fontsize=9.5, va="center")


def no_frame(place: "Axes") -> None:
    place.set_facecolor("none")
    place.tick_params(length=0, labelsize=8, labelcolor=QUIET)
    for spine in place.spines.values():
        spine.set_visible(False)
