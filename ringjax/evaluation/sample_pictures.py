"""What the any-to-any model that travels with the package draws, and what it says of its own drawings.

    words -> picture -> words        pictures.png
    words -> clip                    clip.webp

It is trained elsewhere (configs/small_any_to_any.yaml); the quickstart only asks it.
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ringjax.inference.pictures_out import write_frames
from ringjax.inference.sampling import Sampling
from ringjax.inference.trained import TrainedRun
from ringjax.interop.release import SAMPLE, is_installed

WORDS = (
    "red apple", "blue car", "green tree", "yellow star", "house", "fish", "guitar", "butterfly", "airplane", "clock",
    "snowman", "sunflower",
)  # fmt: skip
CLIP = "rocket"
FRAMES, COLUMNS = 16, 6
DRAWING = Sampling(temperature=1.0, top_k=200, guidance=3.0, seed=0)


def draw_sample_pictures(folder: str | Path, model: str = SAMPLE, frames: int = FRAMES) -> list[Path]:
    """pictures.png and clip.webp in `folder`; nothing where the package came without the model."""
    if model == SAMPLE and not is_installed():
        return []
    run = TrainedRun.load(model)
    codes = run.draw(WORDS, sampling=DRAWING)
    said = run.describe(codes, max_new_tokens=12)
    paths = [_write_sheet(Path(folder) / "pictures.png", run.to_pictures(codes), said)]
    clip = run.draw_clips([CLIP], frames, sampling=DRAWING)[0]
    paths.append(Path(folder) / ("clip.webp" if frames > 1 else "clip.png"))
    write_frames(paths[-1], run.to_pictures(clip), fps=6)
    return paths


def _write_sheet(path: Path, pictures: UInt8[np.ndarray, "n H W C"], said: list[str]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(WORDS) // COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 2.5 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Drawn from words by sample:any-to-any; below: its own words for the drawing", fontsize=10)
    for axes, words, picture, caption in zip(figure.subplots(rows, COLUMNS).ravel(), WORDS, pictures, said):
        axes.imshow(picture)
        axes.set_title(words, fontsize=9)
        axes.set_xlabel(_plain(caption), fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path)
    return path


def _plain(text: str) -> str:
    """A line that any font can show: a model may write any bytes."""
    return "".join(c if c.isascii() and c.isprintable() and c != "$" else " " for c in text).strip()[:28] or "(nothing)"
