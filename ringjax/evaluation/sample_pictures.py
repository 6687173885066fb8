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

# A row of captions that it was trained on, and one that it was not.
WORDS = (
    "red heart", "fried eggs", "neutral orange smiley", "blue baseball cap", "green tree", "fries",
    "red car", "yellow banana", "green apple", "pink flower", "blue bird", "red apple",
)  # fmt: skip
CLIP = "full moon face"
FRAMES, COLUMNS = 16, 6
DRAWING = Sampling(temperature=0.7, top_k=100, guidance=2.5, seed=0)
# Colder: what goes wrong in the first of sixteen frames stays in all of them.
FILMING = Sampling(temperature=0.3, guidance=2.0, seed=0)


def draw_sample_pictures(folder: str | Path, model: str = SAMPLE, frames: int = FRAMES) -> list[Path]:
    """pictures.png and clip.webp in `folder`; nothing where the package came without the model."""
    if model == SAMPLE and not is_installed():
        return []
    run = TrainedRun.load(model)
    codes = run.draw(WORDS, sampling=DRAWING)
    said = run.describe(codes, max_new_tokens=12)
    paths = [_write_sheet(Path(folder) / "pictures.png", run.to_pictures(codes), said)]
    clip = run.draw_clips([CLIP], frames, sampling=FILMING)[0]
    paths.append(Path(folder) / ("clip.webp" if frames > 1 else "clip.png"))
    write_frames(paths[-1], run.to_pictures(clip), fps=6)
    return paths


def _write_sheet(path: Path, pictures: UInt8[np.ndarray, "n H W C"], said: list[str]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(WORDS) // COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 2.5 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Drawn by sample:any-to-any: captions that it learned, captions that it never saw; below each drawing: its own"
        " words for it",
        fontsize=10,
    )
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
