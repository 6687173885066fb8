"""Draws the pictures of the README and the guides: `python scripts/draw_readme.py [FOLDER]`.

The counts in them come from the library's own layouts; nothing is drawn by hand.
"""

import sys
from pathlib import Path

from ringjax.planning import pictures, plan_pictures

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"


def draw(folder: Path) -> list[Path]:
    """Write flops_ratio.png, layouts.png, ring.png and work.png to `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "flops_ratio": plan_pictures.draw_flops_ratio(),
        "layouts": pictures.draw_layouts(seq_len=16, ring_size=4),
        "ring": pictures.draw_ring(ring_size=4),
        "work": pictures.draw_work(ring_size=8, seq_len=8192),
    }
    return [pictures.save(figure, folder / f"{name}.png") for name, figure in figures.items()]


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")
