"""Pictures as PNG, clips as animated WebP, without loss."""

import itertools
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

PICTURE, CLIP = ".png", ".webp"


def check_name(path: str | Path, frames: int) -> None:
    """Raises ValueError for the name of a file that does not suit so many frames."""
    wanted = PICTURE if frames == 1 else CLIP
    if Path(path).suffix.lower() != wanted:
        what = "a picture" if frames == 1 else f"a clip of {frames} frames"
        raise ValueError(f"{str(path)!r} must be the name of a {wanted} file: {what} is written")


def write_frames(path: str | Path, frames: UInt8[np.ndarray, "frames H W *C"], *, fps: float) -> str:
    """One frame as a PNG, several as a WebP that plays `fps` of them a second, again and again; says what it wrote.

    A frame that is the same as the one before it is shown longer; the file has it once. Raises ValueError for a name
    that does not suit.
    """
    check_name(path, len(frames))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first, *more = (Image.fromarray(frame) for frame in frames)
    size = f"{first.width} × {first.height} pixels"
    if not more:
        first.save(path)
        return f"{path}: {size}"
    first.save(path, save_all=True, append_images=more, duration=round(1000 / fps), loop=0, lossless=True, quality=100)
    return f"{path}: {len(frames)} frames of {size}, {fps:g} a second"


def free_name(folder: str | Path, frames: int) -> Path:
    """`picture_1.png`, `clip_2.webp`, …: the first number that no file of the folder has."""
    for number in itertools.count(1):
        names = [Path(folder) / f"picture_{number}{PICTURE}", Path(folder) / f"clip_{number}{CLIP}"]
        if not any(name.exists() for name in names):
            return names[frames > 1]
    raise AssertionError("unreachable")
