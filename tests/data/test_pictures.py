"""Pictures of every kind become the frames that a person would see."""

import numpy as np
import pytest
from PIL import Image

from ringjax.data import pictures
from ringjax.data.errors import DataError
from ringjax.data.pictures import count_frames, read_frames
from tests.fuzz.seeds import blank_png, many_frames_gif, many_frames_png

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(mode: str = "RGB", size: int = 32) -> Image.Image:
    """Red and green above, blue and white below."""
    pixels = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    pixels[:half, :half], pixels[:half, half:], pixels[half:, :half], pixels[half:, half:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(pixels).convert(mode)


def corners(frame: np.ndarray) -> list[tuple]:
    """The colours in the middles of the quarters, row by row."""
    quarter = len(frame) // 4
    places = ((quarter, quarter), (quarter, -quarter), (-quarter, quarter), (-quarter, -quarter))
    return [tuple(int(c) for c in frame[place]) for place in places]


def close(found, expected, by: int = 3) -> bool:
    return bool(np.max(np.abs(np.asarray(found, int) - np.asarray(expected, int))) <= by)


def read(path, picture: Image.Image, name: str, resolution: int = 16, save=None, **options) -> np.ndarray:
    picture.save(path / name, **(save or {}))
    return read_frames(path / name, resolution, **options)


@pytest.mark.parametrize(
    "name, mode, save",
    [
        ("a.png", "RGB", {}),
        ("a.png", "P", {}),
        ("a.png", "RGBA", {}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.webp", "RGBA", {"lossless": True}),
        ("a.gif", "P", {}),
        ("a.jpg", "RGB", {"quality": 95, "subsampling": 0}),
        ("a.jpg", "CMYK", {"quality": 95}),
    ],
)
def test_formats_and_modes(tmp_path, name, mode, save):
    frames = read(tmp_path, quarters(mode), name, save=save)
    assert frames.shape == (1, 16, 16, 3) and frames.dtype == np.uint8
    assert close(corners(frames[0]), [RED, GREEN, BLUE, WHITE], by=8)


@pytest.mark.parametrize("orientation, seen", [
    (1, [RED, GREEN, BLUE, WHITE]), (2, [GREEN, RED, WHITE, BLUE]), (3, [WHITE, BLUE, GREEN, RED]),
    (4, [BLUE, WHITE, RED, GREEN]), (5, [RED, BLUE, GREEN, WHITE]), (6, [BLUE, RED, WHITE, GREEN]),
    (7, [WHITE, GREEN, BLUE, RED]), (8, [GREEN, WHITE, RED, BLUE]),
])  # fmt: skip
def test_the_cameras_rotation_is_obeyed(tmp_path, orientation, seen):
    exif = Image.Exif()
    exif[0x0112] = orientation
    frames = read(tmp_path, quarters(), "a.jpg", save={"exif": exif, "quality": 95, "subsampling": 0})
    assert close(corners(frames[0]), seen, by=8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("background", ["white", "#104060"])
def test_transparency_is_laid_on_the_background(tmp_path, mode, background):
    picture = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 8, 16))
    save = {}
    if mode == "P":
        picture = Image.new("P", (16, 16), 1)
        picture.putpalette([0, 0, 0, 200, 50, 50])
        picture.paste(0, (0, 0, 8, 16))
        save = {"transparency": 1}
    else:
        picture = picture.convert(mode)
    frame = read(tmp_path, picture, "a.png", save=save, background=background)[0]
    expected = (255,) * 3 if background == "white" else (0x10, 0x40, 0x60)
    assert tuple(frame[8, 12]) == expected and tuple(frame[8, 3]) == (0, 0, 0)


def test_deep_grey_is_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 16).astype(np.uint16)[None].repeat(16, 0)
    frame = read(tmp_path, Image.fromarray(ramp), "a.png")[0]
    assert close(frame[0, :, 0], np.linspace(0, 255, 16), by=1)


def test_one_channel(tmp_path):
    frames = read(tmp_path, quarters(), "a.png", channels=1)
    assert frames.shape == (1, 16, 16) and frames[0, -1, -1] == 255


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_clips(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), (20 * i, 0, 255 - 20 * i)) for i in range(9)]
    save = {"save_all": True, "append_images": frames[1:]} | ({"lossless": True} if name == "a.webp" else {})
    clip = read(tmp_path, frames[0], name, save=save)
    assert close(clip[:, 8, 8, 0], [20 * i for i in range(9)])
    assert close(read_frames(tmp_path / name, 16, max_frames=3)[:, 8, 8, 0], [0, 80, 160])


def test_fits(tmp_path):
    wide = Image.new("RGB", (64, 32), RED)
    wide.paste(GREEN, (16, 0, 48, 32))
    cropped = read(tmp_path, wide, "a.png", fit="crop")[0]
    assert close(cropped, np.broadcast_to(GREEN, cropped.shape), by=40) and tuple(cropped[8, 8]) == GREEN
    padded = read(tmp_path, wide, "a.png", fit="pad", background="blue")[0]
    assert tuple(padded[1, 8]) == tuple(padded[-2, 8]) == BLUE and close(padded[8, 1], RED)
    assert read(tmp_path, wide, "a.png", 64, fit="centre").shape == (1, 32, 64, 3)
    with pytest.raises(DataError, match="is larger than 16; use fit crop or pad"):
        read_frames(tmp_path / "a.png", 16, fit="centre")


def test_small_pictures_grow(tmp_path):
    assert read(tmp_path, quarters(size=4), "a.png").shape == (1, 16, 16, 3)


def test_damaged_files_are_named(tmp_path, monkeypatch):
    quarters(size=200).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    cases = {"cut.png": whole[: len(whole) // 2], "garbled.png": b"x" * 200, "empty.png": b"", "a.svg": b"<svg/>"}
    quarters().save(tmp_path / "a.bmp")
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "a.bmp", "nowhere.png"):
        with pytest.raises(
            DataError, match=f"picture .*{name} (cannot be read|is none of PNG|does not exist)"
        ) as error:
            read_frames(tmp_path / name, 16)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(DataError, match="a.png cannot be read: .*exceeds limit"):
        read_frames(tmp_path / "a.png", 16)


def refused(path, content: bytes, **options) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_frames(path, 16, **options)
    assert path.name in str(error.value)
    return str(error.value)


def test_claimed_frames_must_fit_into_the_file(tmp_path):
    """2 ** 31 − 1 frames in 300 bytes: a list of their numbers alone took 16 GB."""
    told = refused(tmp_path / "a.png", many_frames_png(2**31 - 1))
    assert "claims 2147483647 frames in" in told
    with pytest.raises(DataError, match="claims 2147483647 frames"):
        count_frames(tmp_path / "a.png")


def test_pictures_that_are_small_in_the_file_and_large_in_memory(tmp_path, monkeypatch):
    assert "9000 × 9000 pixels, more than 67108864" in refused(tmp_path / "a.png", blank_png(9000, 9000))
    assert "8000 × 8000 pixels, more than 33554432" in refused(tmp_path / "a.gif", many_frames_gif(2, 8000))
    monkeypatch.setattr(pictures, "MOST_FRAMES", 10)
    assert "a.gif has 11 frames, more than 10" in refused(tmp_path / "a.gif", many_frames_gif(11))
    monkeypatch.setattr(pictures, "MOST_CLIP_PIXELS", 1000)
    assert "2560 pixels in 10 frames of 16 × 16, more than 1000" in refused(tmp_path / "a.gif", many_frames_gif(10))
    monkeypatch.undo()
    monkeypatch.setattr(pictures, "MOST_BYTES", 2000)
    told = refused(tmp_path / "a.gif", many_frames_gif(3))
    assert "takes 2304 bytes as 3 frames of 16 × 16, more than 2000; give max_frames" in told
    assert read_frames(tmp_path / "a.gif", 16, max_frames=2).shape == (2, 16, 16, 3)


def test_a_cut_block_of_a_gif_is_named(tmp_path):
    """Pillow 13 raises struct.error."""
    whole = many_frames_gif(2)
    for size in range(14, len(whole)):
        (tmp_path / "a.gif").write_bytes(whole[:size])
        try:
            read_frames(tmp_path / "a.gif", 16)
        except DataError as error:
            assert "a.gif" in str(error)
