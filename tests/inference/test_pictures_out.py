"""What is written can be read again, pixel for pixel."""

import numpy as np
import pytest
from PIL import Image

from ringjax.data.errors import DataError
from ringjax.data.pictures import read_clip
from ringjax.inference.pictures_out import free_name, write_frames


def frames(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("shape", "channels"), [((12, 12, 3), 3), ((12, 12), 1)])
def test_the_same_frames_come_back(tmp_path, count, shape, channels):
    path = tmp_path / "new" / ("clip.webp" if count > 1 else "picture.png")
    said = write_frames(path, frames(count, *shape), fps=8)
    assert str(path) in said and "12 × 12 pixels" in said and ("4 frames" in said) == (count > 1)
    np.testing.assert_array_equal(read_clip(path, 12, channels=channels), frames(count, *shape))


def test_a_clip_plays_at_its_speed_and_again(tmp_path):
    path = tmp_path / "clip.webp"
    write_frames(path, frames(3, 8, 8, 3), fps=8)
    with Image.open(path) as clip:
        assert clip.n_frames == 3 and clip.info["loop"] == 0
        clip.seek(1)
        clip.load()
        assert clip.info["duration"] == 125


def test_a_still_clip_keeps_its_length(tmp_path):
    path = tmp_path / "still.webp"
    write_frames(path, np.repeat(frames(2, 8, 8, 3), 2, axis=0), fps=10)
    with Image.open(path) as clip:
        lengths = []
        for index in range(clip.n_frames):
            clip.seek(index)
            clip.load()
            lengths.append(clip.info["duration"])
    assert sum(lengths) == 400


def test_names_are_free(tmp_path):
    assert free_name(tmp_path, 1).name == "picture_1.png"
    (tmp_path / "clip_1.webp").touch()
    assert free_name(tmp_path, 1).name == "picture_2.png" and free_name(tmp_path, 5).name == "clip_2.webp"


def test_a_folder_of_frames_is_a_clip(tmp_path):
    written = frames(11, 6, 6, 3)
    for number, frame in enumerate(written):
        Image.fromarray(frame).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    np.testing.assert_array_equal(read_clip(tmp_path, 6), written)
    np.testing.assert_array_equal(read_clip(tmp_path, 6, max_frames=3), written[[0, 5, 10]])
    assert read_clip(tmp_path, 4).shape == (11, 4, 4, 3)
    Image.fromarray(frames(1, 5, 6, 3)[0]).save(tmp_path / "frame_11.png")
    with pytest.raises(DataError, match="frame .*frame_11.png is 5 × 6 and the first one 6 × 6; use fit crop or pad"):
        read_clip(tmp_path, 6, fit="centre")
    (tmp_path / "frame_3.png").write_text("broken")
    with pytest.raises(DataError, match="picture .*frame_3.png is none of PNG"):
        read_clip(tmp_path, 6)
