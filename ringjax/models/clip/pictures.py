"""What a vision transformer wants of a picture: its size, its range. The same numbers as transformers' CLIP processors.

    uint8 [H, W, 3] -> pad to a square -> resize -> middle -> · rescale -> (x − mean) / std -> float32 [size, size, 3]
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ringjax.json_text import brief

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# A size read from a damaged file is refused before anything of that size is made; so is a picture of such a shape.
_LARGEST = 4096
_MOST_PIXELS = _LARGEST**2


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How pictures are prepared; the defaults are those of LLaVA-1.5.

    Raises ValueError for values that cannot be.
    """

    resize: int | tuple[int, int] | None = 336
    """Size of the shorter edge, or height and width; None: as it is."""
    crop: tuple[int, int] | None = (336, 336)
    """Height and width of the middle that is kept, with black around a smaller picture; None: all of it."""
    resample: int = int(Image.Resampling.BICUBIC)
    """Pillow's number of the filter."""
    rescale: float | None = 1 / 255
    """What values are multiplied by; None: nothing."""
    mean: tuple[float, ...] | None = CLIP_MEAN
    """Of each colour, after `rescale`; None: not normalised."""
    std: tuple[float, ...] | None = CLIP_STD
    """Of each colour."""
    pad_to_square: bool = False
    """Whether bars of the mean colour make the picture a square first."""

    def __post_init__(self):
        sizes = [self.resize] if isinstance(self.resize, int) else list(self.resize or ())
        for size in (*sizes, *(self.crop or ())):
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _LARGEST:
                raise ValueError(f"size {brief(size)} must be a whole number from 1 to {_LARGEST}")
        filters = sorted(int(x) for x in Image.Resampling)
        if self.resample not in filters:
            raise ValueError(f"resample {brief(self.resample)} is not one of Pillow's filters, {filters}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both or neither")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and (len(values) != 3 or not all(_is_finite(x) for x in values)):
                raise ValueError(f"{name} {brief(values)} must be three finite numbers, one a colour")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std!r} must be above 0")
        if self.rescale is not None and not (_is_finite(self.rescale) and self.rescale > 0):
            raise ValueError(f"rescale {brief(self.rescale)} must be a finite number above 0")
        if self.pad_to_square and self.mean is None:
            raise ValueError("pad_to_square needs the mean, which is the colour of the bars")

    def __call__(self, picture: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
        """The pixels of a picture, float32. Raises ValueError for what is not uint8 `[H, W, 3]`."""
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise ValueError(f"the picture is {picture.dtype}{list(picture.shape)}; give uint8 [H, W, 3], in RGB")
        if self.pad_to_square:
            height, width, _ = picture.shape
            size = max(height, width)
            if size * size > max(_MOST_PIXELS, 4 * height * width):
                raise ValueError(f"a picture of {height} × {width} would be a square of {size}; cut it")
            picture = _square(picture, [int(255 * x) for x in self.mean])
        if self.resize is not None:
            height, width = self._size(*picture.shape[:2])
            image = Image.fromarray(picture).resize((width, height), Image.Resampling(self.resample))
            picture = np.asarray(image)
        if self.crop is not None:
            picture = _middle(picture, *self.crop)
        # The order of roundings is that of transformers: a product in float64, the rest in float32.
        pixels = picture.astype(np.float64) * (1.0 if self.rescale is None else self.rescale)
        pixels = pixels.astype(np.float32)
        if self.mean is None:
            return pixels
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """After resizing; raises ValueError where a long thin picture would become too large."""
        if not isinstance(self.resize, int):
            return self.resize
        short, long = sorted((height, width))
        longer = int(self.resize * long / short)
        if longer * self.resize > _MOST_PIXELS:
            raise ValueError(
                f"a picture of {height} × {width} would be {longer} long with its shorter edge {self.resize}; cut it"
            )
        return (longer, self.resize) if width <= height else (self.resize, longer)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _square(picture: np.ndarray, colour: list[int]) -> np.ndarray:
    height, width, _ = picture.shape
    size = max(height, width)
    square = np.broadcast_to(np.asarray(colour, np.uint8), (size, size, 3)).copy()
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def _middle(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle; of an odd number of lines too many, more are cut from below; too few: more are added above."""
    for axis, size in ((0, height), (1, width)):
        extra = picture.shape[axis] - size
        if extra >= 0:
            picture = picture.take(range(extra // 2, extra // 2 + size), axis)
        else:
            before = (1 - extra) // 2
            around = [(0, 0)] * 3
            around[axis] = (before, -extra - before)
            picture = np.pad(picture, around)
    return picture
