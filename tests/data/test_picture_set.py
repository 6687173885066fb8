"""Pictures and clips of a captions.jsonl as rows: sound ones, odd ones and broken ones."""

import json

import numpy as np
import pytest
from PIL import Image

from ringjax.data.errors import DataError
from ringjax.data.heldout import side_of
from ringjax.data.picture_set import DecodedSet, LeftOut, PictureForm, PictureSet, list_files
from tests.data.picture_folder import drawn, picture_folder, save_clip, write_captions

FORM = PictureForm(16, 3, "crop", "white")
KINDS = [DecodedSet, PictureSet]


def files_of(path, on_error="stop", share=0.0, side="train"):
    left_out = LeftOut(on_error)
    return list_files(path, side, share, left_out), left_out


@pytest.fixture
def mixed(tmp_path):
    """Two pictures around a clip of three frames and one of a single frame."""
    picture_folder(tmp_path, 2)
    save_clip(tmp_path / "clip.webp", 3, first=10)
    save_clip(tmp_path / "still.webp", 1, first=20)
    names = ["0.png", "clip.webp", "still.webp", "1.png"]
    return write_captions(tmp_path, [{"file": name, "caption": name} for name in names])


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_a_row(mixed, kind):
    files, left_out = files_of(mixed)
    assert [file.frames for file in files] == [1, 3, 1, 1]
    found = kind(files, FORM, left_out)
    assert len(found) == 6
    assert [(found.where(i)[0].path.name, found.where(i)[1]) for i in range(6)] == [
        ("0.png", 0), ("clip.webp", 0), ("clip.webp", 1), ("clip.webp", 2), ("still.webp", 0), ("1.png", 0),
    ]  # fmt: skip
    expected = np.stack([np.asarray(drawn(i).resize((16, 16), Image.Resampling.LANCZOS)) for i in (1, 12, 0)])
    np.testing.assert_array_equal(found[[5, 3, 0]], expected)


def test_kept_and_streamed_pictures_are_the_same(mixed):
    files, left_out = files_of(mixed)
    kept, streamed = (kind(files, FORM, left_out) for kind in KINDS)
    np.testing.assert_array_equal(kept[range(6)], streamed[range(6)])
    assert kept.fingerprint == streamed.fingerprint
    assert kept.fingerprint != DecodedSet(files[1:], FORM, left_out).fingerprint


def test_sides_share_no_caption(tmp_path):
    path = picture_folder(tmp_path, 60)
    train, held_out = (files_of(path, share=0.4, side=side)[0] for side in ("train", "heldout"))
    assert len(train) + len(held_out) == 60 and len(held_out) > 10
    assert all(side_of(f"thing {file.path.stem}", 0.4) == "heldout" for file in held_out)


def odd_files(folder):
    """File -> what its middle must look like, of pictures that are unusual but sound."""
    red = Image.new("RGB", (30, 20), (255, 0, 0))
    red.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    transparent = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    transparent.save(folder / "alpha.png")
    turned = Image.new("RGB", (40, 20), (0, 0, 255))
    turned.paste((255, 0, 0), (0, 0, 20, 20))  # red on the left; turned by 90° it is above
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif, quality=95, subsampling=0)
    Image.new("RGB", (1, 1), (0, 255, 0)).save(folder / "pixel.png")
    Image.new("RGB", (20_000, 40), (0, 0, 255)).save(folder / "wide.png")
    save_clip(folder / "one_frame.webp", 1)
    return {
        "cmyk.jpg": (255, 0, 0), "palette.png": (255, 0, 0), "alpha.png": (255, 255, 255), "turned.jpg": None,
        "pixel.png": (0, 255, 0), "wide.png": (0, 0, 255), "one_frame.webp": None,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_odd_pictures_are_pictures(tmp_path, kind):
    expected = odd_files(tmp_path)
    path = write_captions(tmp_path, [{"file": name} for name in expected])
    files, left_out = files_of(path)
    found = kind(files, FORM, left_out)
    pictures = dict(zip(expected, found[range(len(expected))]))
    for name, colour in expected.items():
        if colour is not None:
            assert np.abs(pictures[name][8, 8].astype(int) - colour).max() <= 4, name
    above, below = (pictures["turned.jpg"][row, 8].astype(int) for row in (2, 13))
    assert above[0] > 200 > below[0] and below[2] > 200
    assert not left_out.reasons


def broken_files(folder):
    """File -> a word of the reason, of files that cannot be used."""
    drawn(1).save(folder / "whole.png")
    content = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    save_clip(folder / "whole.webp", 4)
    clip = (folder / "whole.webp").read_bytes()
    (folder / "cut.webp").write_bytes(clip[: len(clip) // 2])
    (folder / "words.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return ["cut.png", "cut.webp", "words.png", "empty.png", "bomb.png", "gone.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_skipped_with_their_names(tmp_path, kind):
    path = picture_folder(tmp_path, 3)
    good = [json.loads(line) for line in path.read_text().splitlines()]
    broken = broken_files(tmp_path)
    path = write_captions(tmp_path, [*good[:2], *({"file": name} for name in broken), good[2]])
    with path.open("a") as file:
        file.write('{"caption": "no file"}\nnot json\n')
    files, left_out = files_of(path, "skip")
    found = kind(files, FORM, left_out)
    pictures = found[range(len(found))]
    assert len(pictures) == len(found)
    sound = [np.asarray(drawn(i).resize((16, 16), Image.Resampling.LANCZOS)) for i in range(3)]
    for picture in pictures:  # in place of a broken one another one is seen, never noise
        assert any(np.array_equal(picture, one) for one in sound)
    reasons = list(left_out.reasons.values())
    assert len(reasons) == len(broken) + 2
    for name in broken:
        assert sum(name in reason for reason in reasons) == 1, name
    lines = left_out.lines(most=3)
    assert lines[0].startswith("8 picture(s)") and len(lines) == 5 and lines[-1] == "  and 5 more"


@pytest.mark.parametrize("name", ["cut.png", "cut.webp", "words.png", "gone.png"])
def test_or_the_first_one_stops_with_its_line(tmp_path, name):
    path = picture_folder(tmp_path, 1)
    broken_files(tmp_path)
    path = write_captions(tmp_path, [{"file": "0.png"}, {"file": name}])
    with pytest.raises(DataError, match=f"captions.jsonl line 2: .*{name}.*data.on_error skip"):
        files, left_out = files_of(path)
        DecodedSet(files, FORM, left_out)


def test_nothing_that_can_be_read_is_said(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"")
    drawn(0).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) * 2 // 3])
    files, left_out = files_of(write_captions(tmp_path, [{"file": "cut.png"}]), "skip")
    assert len(DecodedSet(files, FORM, left_out)) == 0
    with pytest.raises(DataError, match="none of 1 pictures can be read"):
        PictureSet(files, FORM, left_out)[[0]]


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "sub/../../outside.png", "x" * 300, "\0"])
def test_a_name_leads_nowhere_but_into_the_folder(tmp_path, name):
    drawn(0).save(tmp_path / "outside.png")
    folder = tmp_path / "set"
    folder.mkdir()
    path = write_captions(folder, [{"file": name, "caption": "a"}])
    with pytest.raises(DataError, match="line 1: file .*(leads out of the folder|is no name|longer than)"):
        files_of(path)
