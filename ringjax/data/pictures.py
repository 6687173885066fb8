"""Pictures and clips from files to square uint8 frames.

PNG, JPEG, WebP and GIF, still or animated. A camera's rotation mark (EXIF) is obeyed; transparency is laid on the
background; palettes, grey, CMYK and 16-bit grey become RGB or grey as the image tokenizer wants.
"""

import contextlib
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageOps

from ringjax.data.errors import DataError

Fit = Literal["crop", "pad", "centre"]

# Nothing else is parsed: Pillow knows many formats, some through outside programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
MOST_PIXELS = 1 << 26
"""Of a still PNG or JPEG, 8192 × 8192; half of it for clips, GIF and WebP, of which several copies are in memory: so no
picture takes more than 1 GiB, however small its file is."""
MOST_FRAMES = 1 << 14
"""Of a clip; nine minutes at 30 frames a second."""
MOST_CLIP_PIXELS = 1 << 29
"""Pixels in all frames that are decoded, some seconds' work; 258 frames of 1920 × 1080, 8,192 of 256 × 256."""
MOST_BYTES = 1 << 30
"""Of the frames that one call gives."""
_LEAST_FRAME = 8  # bytes of a file; every format needs more for a frame
_ORIENTATION = 0x0112
# What Pillow raises on damaged or hostile files of these formats.
_FAULTS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def read_frames(
    path: str | Path,
    resolution: int,
    *,
    channels: int = 3,
    fit: Fit = "crop",
    background: str = "white",
    max_frames: int | None = None,
) -> UInt8[np.ndarray, "frames H W *C"]:
    """The frames of a picture (one) or clip, at most `max_frames` of them, evenly spread.

    `fit`: `crop` the middle square and resize it; `pad` to a square with the background and resize; `centre` leaves
    the size as it is (no larger than `resolution`), for tokenizers of small pictures. With 3 channels the frames are
    `[frames, H, W, 3]`, with 1 `[frames, H, W]`.

    Raises:
        DataError: the file is missing, damaged, of another kind, or too large.
    """
    with _explained(path):
        return _read(Path(path), resolution, channels, fit, background, lambda count: spread(count, max_frames))


def read_frame(
    path: str | Path, index: int, resolution: int, *, channels: int = 3, fit: Fit = "crop", background: str = "white"
) -> UInt8[np.ndarray, "H W *C"]:
    """Frame `index` of a file, made as `read_frames` makes it; raises as it does."""
    with _explained(path):
        return _read(Path(path), resolution, channels, fit, background, lambda count: [index])[0]


def count_frames(path: str | Path) -> int:
    """How many frames a file has, 1 for a picture; only its beginning is looked at. Raises as `read_frames` does."""
    with _explained(path), _opened(path) as (_, frames):
        return frames


def spread(count: int, most: int | None) -> list[int]:
    """The indices of `count` frames, or `most` of them, evenly spread."""
    if most is None or count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).astype(int).tolist()


def open_picture(path: str | Path, channels: int = 3, background: str = "white") -> Image.Image:
    """A picture (of a clip, the first frame) as `flatten` makes it, in its own size. Raises as `read_frames` does."""
    with _explained(path), _opened(path) as (picture, _):
        return flatten(picture, channels, background)


@contextlib.contextmanager
def _opened(path: str | Path):
    """The picture and its number of frames, both within the limits; nothing is decoded yet."""
    with Image.open(path, formats=FORMATS) as picture:
        frames = getattr(picture, "n_frames", 1)
        _check_size(picture, frames, path)
        size = Path(path).stat().st_size
        if frames * _LEAST_FRAME > size:
            raise DataError(f"picture {path} claims {frames} frames in {size} bytes; it is damaged, make it again")
        if frames > MOST_FRAMES:
            raise DataError(f"clip {path} has {frames} frames, more than {MOST_FRAMES}; cut it into several clips")
        yield picture, frames


def _check_size(picture: Image.Image, frames: int, path: str | Path) -> None:
    width, height = picture.size
    most = MOST_PIXELS if frames == 1 and picture.format in ("PNG", "JPEG") else MOST_PIXELS // 2
    if width * height > most:
        raise DataError(f"picture {path} has {width} × {height} pixels, more than {most}; scale it down first")


@contextlib.contextmanager
def _explained(path: str | Path):
    """Pillow's many faults as a DataError."""
    try:
        with warnings.catch_warnings():
            # A picture of more pixels than Pillow trusts is an error for this line, not a message on the screen.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError:
        raise DataError(f"picture {path} does not exist") from None
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"picture {path} is none of {', '.join(FORMATS)}, or its beginning is damaged") from None
    except _FAULTS as error:
        raise DataError(f"picture {path} cannot be read: {error}") from None


def read_clip(
    path: str | Path,
    resolution: int,
    *,
    channels: int = 3,
    fit: Fit = "crop",
    background: str = "white",
    max_frames: int | None = None,
) -> UInt8[np.ndarray, "frames H W *C"]:
    """The same of a file, or of a folder that holds a picture a frame: by name, `frame_2.png` before `frame_10.png`.

    Raises:
        DataError: as `read_frames`, and for a folder without pictures or with frames of different sizes.
    """
    if not Path(path).is_dir():
        return read_frames(
            path, resolution, channels=channels, fit=fit, background=background, max_frames=max_frames
        )  # fmt: skip
    files = sorted((file for file in Path(path).iterdir() if file.suffix.lower() in SUFFIXES), key=_natural)
    if not files:
        raise DataError(f"folder {path} holds no frames; put {', '.join(SUFFIXES)} files into it, one a frame")
    if max_frames is not None:
        files = [files[i] for i in spread(len(files), max_frames)]
    frames = [
        read_frames(file, resolution, channels=channels, fit=fit, background=background, max_frames=1)[0]
        for file in files
    ]
    for file, frame in zip(files, frames):
        if frame.shape != frames[0].shape:
            sizes = (" × ".join(map(str, x.shape[:2])) for x in (frame, frames[0]))
            raise DataError(f"frame {file} is {next(sizes)} and the first one {next(sizes)}; use fit crop or pad")
    return np.stack(frames)


def is_clip(path: str | Path) -> bool:
    """Whether this is several frames: a folder, or an animated file. Raises as `read_frames` does."""
    if Path(path).is_dir():
        return True
    return count_frames(path) > 1


def _natural(file: Path) -> list:
    """A key by which numbers in names are numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _read(
    path: Path, resolution: int, channels: int, fit: Fit, background: str, wanted: Callable[[int], list[int]]
) -> np.ndarray:
    with _opened(path) as (picture, count):
        indices = wanted(count)
        _check_work(picture, indices, resolution, channels, fit, path)
        found: np.ndarray | None = None
        for place, index in enumerate(indices):
            picture.seek(index)
            _check_size(picture, count, path)  # a frame may be larger than the first
            frame = np.asarray(_square(flatten(picture, channels, background), resolution, fit, background, path))
            if found is None:
                found = np.empty((len(indices), *frame.shape), np.uint8)
            if frame.shape != found.shape[1:]:
                raise DataError(f"picture {path} has frames of different sizes; use fit crop or pad")
            found[place] = frame
        return found


def _check_work(
    picture: Image.Image, indices: list[int], resolution: int, channels: int, fit: Fit, path: str | Path
) -> None:
    """Refuse what takes too long to decode, or too much memory when it is decoded."""
    width, height = picture.size
    if fit == "centre" and max(width, height) > resolution:
        raise DataError(f"picture {path} of {picture.size} is larger than {resolution}; use fit crop or pad")
    # The frames before one that is wanted are decoded too.
    if len(indices) > 1 or indices[0]:
        pixels = (indices[-1] + 1) * width * height
        if pixels > MOST_CLIP_PIXELS:
            raise DataError(
                f"clip {path} has {pixels} pixels in {indices[-1] + 1} frames of {width} × {height}, more than"
                f" {MOST_CLIP_PIXELS}; scale it down or cut it first"
            )
    size = len(indices) * resolution * resolution * channels
    if size > MOST_BYTES:
        raise DataError(
            f"clip {path} takes {size} bytes as {len(indices)} frames of {resolution} × {resolution}, more than"
            f" {MOST_BYTES}; give max_frames, or cut it into several clips"
        )


def flatten(picture: Image.Image, channels: int, background: str) -> Image.Image:
    """The picture upright, without transparency, in RGB (3 channels) or grey (1)."""
    # No copy that is not needed: a picture may have many pixels.
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255 instead of scaling it.
        picture = Image.fromarray((np.clip(np.asarray(picture), 0, 65535) >> 8).astype(np.uint8))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, ImageColor.getrgb(background))
        picture = Image.alpha_composite(ground, picture)
    picture = picture.convert("RGB")  # a copy at least: the file is closed behind it
    return picture if channels == 3 else picture.convert("L")


def _square(picture: Image.Image, resolution: int, fit: Fit, background: str, path: Path) -> Image.Image:
    if fit == "centre":
        if max(picture.size) > resolution:  # a later frame, or one that was turned
            raise DataError(f"picture {path} of {picture.size} is larger than {resolution}; use fit crop or pad")
        return picture
    if picture.size == (resolution, resolution):
        return picture
    size, how = (resolution, resolution), Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(picture, size, method=how)
    return ImageOps.pad(picture, size, method=how, color=background)
