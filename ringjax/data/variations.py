"""Variations of a picture: the same thing a little larger, further left, turned, or mirrored.

A few thousand pictures are learned by heart in minutes; seen a little differently every time, what is learned is the
thing. All frames of a clip are changed alike, so that what moves in it still moves.
"""

import math
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor

ZOOM, SHIFT, TURN = 0.15, 0.06, 5.0
"""Largest changes: of the size (as a share), of the place (as a share of the side), of the angle (degrees)."""
OVERSAMPLE = 2
"""Pictures are changed at so many times the resolution, so that they stay as sharp as the plain ones."""
# Of pictures whose captions have one of these words a mirror image would be another thing.
_SIDED = frozenset(
    (
        "left",
        "right",
        "leftwards",
        "rightwards",
        "clockwise",
        "counterclockwise",
        "anticlockwise",
        "sign",
        "letter",
        "flag",
    )
)


def vary(
    frames: UInt8[np.ndarray, "frames H W *C"], rng: np.random.Generator, *, background: str = "white",
    mirror: bool = False,
) -> UInt8[np.ndarray, "frames h w *C"]:  # fmt: skip
    """The frames changed alike, at random, at half the size (`OVERSAMPLE`); `mirror`: every second time mirrored."""
    size = frames.shape[1]
    scale = 1 + rng.uniform(-ZOOM, ZOOM)
    angle = math.radians(rng.uniform(-TURN, TURN))
    across, down = rng.uniform(-SHIFT, SHIFT, 2) * size
    flip = -1 if mirror and rng.random() < 0.5 else 1
    # From where the pixel (x, y) of the result is taken: turned and scaled about the middle.
    cos, sin, middle = math.cos(angle) / scale, math.sin(angle) / scale, (size - 1) / 2
    taken = (
        flip * cos, flip * sin, middle - flip * (cos * middle + sin * middle) - across,
        -sin, cos, middle + sin * middle - cos * middle - down,
    )  # fmt: skip
    return np.stack([_changed(frame, taken, background) for frame in frames])


def may_be_mirrored(caption: str) -> bool:
    """Whether a mirror image still shows what the caption says."""
    return _SIDED.isdisjoint(caption.lower().replace("-", " ").replace(":", " ").split())


def number_of(name: str, line_index: int, variant: int) -> tuple[int, int, int]:
    """A seed for one variation of one picture, the same in every process."""
    return zlib.crc32(name.encode("utf-8")), line_index, variant


def _changed(frame: np.ndarray, taken: tuple[float, ...], background: str) -> np.ndarray:
    picture = Image.fromarray(frame)
    ground = ImageColor.getcolor(background, picture.mode)
    # At twice the size bilinear and a box are as sharp as Lanczos on the plain picture, in a third of the time.
    changed = picture.transform(
        picture.size, Image.Transform.AFFINE, taken, resample=Image.Resampling.BILINEAR, fillcolor=ground
    )
    return np.asarray(changed.reduce(OVERSAMPLE))
