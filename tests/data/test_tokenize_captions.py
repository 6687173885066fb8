"""Caption files: held-out captions, long ones, variants of pictures, and several lines in one example."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ringjax.data.bundles import Line, Part, plan
from ringjax.data.errors import DataError
from ringjax.data.heldout import heldout
from ringjax.data.records import META, RecordReader
from ringjax.data.tokenizers import ByteTokenizer
from ringjax.data.variations import may_be_mirrored, vary
from ringjax.models.vqgan import VQGAN, VQGANConfig, save_vqgan
from tests.data.helpers import write_jsonl
from tests.data.test_tokenize import contents, tokenize

VQ = VQGANConfig(
    resolution=16, hidden=8, multipliers=(1, 1, 1), res_blocks=1, z_channels=8, codes=32, code_dim=4, norm_groups=4
)  # fmt: skip


def captions_of(folder) -> list[str]:
    reader = RecordReader(folder)
    examples = (reader[i] for i in range(len(reader)))
    return [ByteTokenizer().decode(e.tokens[~e.modality].tolist()) for e in examples]


def coded(captions, frames: int = 1) -> list[dict]:
    """Lines whose codes say which line they are of."""
    return [{"caption": caption, "vision": [i] * 4 * frames} for i, caption in enumerate(captions)]


def test_held_out_captions_are_on_one_side_only(tmp_path):
    captions = [f"thing {i}" for i in range(60)]
    lines = write_jsonl(tmp_path / "a.jsonl", coded(captions))
    found = {}
    for split in ("train", "heldout"):
        tokenize(lines, tmp_path / split, fields="caption", split=split, heldout_share=0.3)
        found[split] = captions_of(tmp_path / split)
        assert RecordReader(tmp_path / split).meta["heldout_share"] == 0.3
    assert found["heldout"] == [c for c in captions if heldout(c, 0.3)] and found["heldout"]
    assert sorted(found["train"] + found["heldout"]) == sorted(captions)
    with pytest.raises(ValueError, match="split heldout has no line at heldout_share 0"):
        tokenize(lines, tmp_path / "none", fields="caption", split="heldout", heldout_share=0.0)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match="split train is by captions"):
        tokenize(str(tmp_path / "b.txt"), tmp_path / "none", split="train")


def test_captions_of_ten_thousand_words_are_refused_or_cut(tmp_path):
    rows = coded(["short", "long " * 10_000])
    rows.append({"fields": "text", "text": "word " * 10_000})  # no caption: a text may be long
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="line 2: field 'caption' has 10000 words, more than caption_words 256"):
        tokenize(lines, tmp_path / "none", fields="[vision],caption")
    report = tokenize(lines, tmp_path / "skip", fields="[vision],caption", on_error="skip")
    assert report.examples == 2 and len(report.skipped) == 1
    report = tokenize(lines, tmp_path / "cut", fields="[vision],caption", long_captions="truncate", caption_words=3)
    assert report.examples == 3 and report.truncated == 1 and "1 texts cut" in str(report)
    assert captions_of(tmp_path / "cut")[1].endswith("</vision>long long long")
    assert json.loads((tmp_path / "cut" / META).read_text())["truncated"] == 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Six pictures and a clip of three frames with captions, and an image tokenizer."""
    folder, rng, rows = tmp_path_factory.mktemp("captions"), np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"file": f"{i}.png", "caption": f"noise {i}", "keywords": []})
    frames = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(folder / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    rows.append({"file": "clip.webp", "caption": "a clip", "fps": 4.0})
    write_jsonl(folder / "captions.jsonl", rows)
    save_vqgan(VQGAN(VQ, nnx.Rngs(0)), folder / "vqgan.safetensors")
    return folder


def test_variants_see_the_picture_differently_and_are_the_same_for_any_workers(tmp_path, pictures):
    made = []
    for workers in (0, 2):
        report = tokenize(
            str(pictures / "captions.jsonl"), tmp_path / f"set{workers}", variants=3, mirror=True, workers=workers,
            fields=("[vision],caption", "[caption],vision"), vision_tokenizer=str(pictures / "vqgan.safetensors"),
            vision_codes=None, examples_per_shard=8,
        )  # fmt: skip
        assert report.examples == 3 * 7
        made.append(contents(report.folder))
    assert made[0] == made[1]
    reader = RecordReader(tmp_path / "set0")
    assert reader.meta["vision_codes"] == 32, "the tokenizer's own number"
    codes = [tuple(reader[i].tokens[reader[i].modality]) for i in range(21)]
    assert len(set(codes[:3])) == 3 and len(set(codes)) == 21
    drawn = [bool(reader[i].loss[reader[i].modality].any()) for i in range(21)]
    assert len(set(drawn[:6])) == 2, "each variant chooses a direction"


def test_variations_keep_the_thing_where_it_is():
    frame = np.full((2, 64, 64, 3), 255, np.uint8)
    frame[:, 16:48, 8:32] = 0  # left of the middle
    moved = [vary(frame, np.random.default_rng(i)) for i in range(20)]
    flipped = [vary(frame, np.random.default_rng(i), mirror=True) for i in range(20)]
    left = lambda frames: (frames[0, :, :16] < 128).sum() > (frames[0, :, 16:] < 128).sum()  # noqa: E731
    assert all(frames.shape == (2, 32, 32, 3) and np.array_equal(*frames) for frames in moved)
    assert all(125 < (frames[0, ..., 0] < 128).sum() < 280 for frames in moved), "192 pixels, a little more or less"
    assert all(map(left, moved)) and 4 < sum(map(left, flipped)) < 16
    assert all((frames[0, 0, 0] > 200).all() for frames in moved), "the ground is white"
    assert may_be_mirrored("a red fox") and not may_be_mirrored("arrow pointing left") and not may_be_mirrored("Flag")
    grey = vary(frame[..., 0], np.random.default_rng(0))
    assert grey.shape == (2, 32, 32)


def test_joined_lines_are_turns_of_one_example(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", coded([f"c{i}" for i in range(20)]))
    report = tokenize(lines, tmp_path / "set", fields='caption,vision,"\n"', join=4, join_least=2, variants=2)
    reader = RecordReader(report.folder)
    seen = []
    for i in range(len(reader)):
        example = reader[i]
        codes = example.tokens[example.modality].reshape(-1, 5)[:, 0].tolist()
        said = "".join(f"c{code}<vision></vision>\n" for code in codes)
        assert ByteTokenizer().decode(example.tokens[~example.modality].tolist()) == said
        assert example.loss[1:].all() and len(codes) <= 4
        seen += codes
    assert sorted(seen) == sorted([*range(20)] * 2) and report.examples < 20
    assert len(set(seen[:20])) == 20 and seen[:20] != seen[20:], "another order in each variant"


def test_joined_lines_are_one_video_or_hide_a_needle(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", coded([f"c{i}" for i in range(6)], frames=2))
    tokenize(lines, tmp_path / "video", fields="[vision],caption", join=3, join_as="video")
    reader = RecordReader(tmp_path / "video")
    frames = [reader[i].tokens[reader[i].modality].reshape(-1, 5) for i in range(2)]
    assert all(f[:, 4].tolist() == [100] * 5 + [101] for f in frames), "one video, one end"
    for said, codes in zip(captions_of(tmp_path / "video"), frames):
        assert said == "<vision></vision>" + "; ".join(f"c{code}" for code in codes[::2, 0])
    tokenize(lines, tmp_path / "needle", fields="[vision],caption", join=5, join_as="needle")
    reader, depths, others = RecordReader(tmp_path / "needle"), set(), set()
    for i, said in enumerate(captions_of(tmp_path / "needle")):
        codes = reader[i].tokens[reader[i].modality].reshape(-1, 5)[::2, 0].tolist()
        needle = int(said.removeprefix("<vision></vision>c"))
        assert len(codes) == 5 and codes.count(needle) == 1 and 2 <= len(set(codes)) <= 5
        others.add(len(set(codes)))
        depths.add(codes.index(needle))
    assert len(reader) == 6 and len(depths) > 1 and len(others) > 1


def test_a_bad_line_leaves_the_others_of_its_example(tmp_path):
    rows = coded(["c0", "", "c2", "c3"])
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="line 2: field 'caption' is empty"):
        tokenize(lines, tmp_path / "none", fields="caption,vision", join=4)
    report = tokenize(lines, tmp_path / "set", fields="caption,vision", join=4, variants=3, on_error="skip")
    assert len(report.skipped) == 1 and report.examples == 3, "told once, whatever it was to be in"
    assert all(sorted(c.replace("</vision>", "").split("<vision>")) == ["", "c0", "c2", "c3"]
               for c in captions_of(tmp_path / "set"))  # fmt: skip


def test_damaged_files_among_many_are_named(tmp_path, pictures):
    good = json.loads((pictures / "captions.jsonl").read_text().splitlines()[0])
    whole = (pictures / "clip.webp").read_bytes()
    files = {
        "cut.webp": whole[: len(whole) // 2], "empty.png": b"", "garbled.webp": whole[:40] + bytes(len(whole) - 40),
        "text.jpg": b"this is no picture",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "linked").symlink_to(pictures)
    rows = [{**good, "file": f"linked/{good['file']}", "caption": f"fine {i}"} for i in range(300)]
    for at, name in zip((3, 77, 150, 299), files):
        rows[at] = {"file": name, "caption": name}
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    options = dict(fields="[vision],caption", vision_tokenizer=str(pictures / "vqgan.safetensors"), vision_codes=None)
    report = tokenize(lines, tmp_path / "set", on_error="skip", **options)
    assert report.examples == 296 and len(report.skipped) == 4 and "4 lines skipped" in str(report)
    told = (tmp_path / "set" / "skipped.txt").read_text().splitlines()
    for at, name, line in zip((3, 77, 150, 299), files, told, strict=True):
        assert f"line {at + 1}: picture" in line and name in line
    with pytest.raises(DataError, match="line 4: picture .*cut.webp"):
        tokenize(lines, tmp_path / "none", **options)


def test_the_plan_is_the_same_every_time():
    lines = [Line("a", i, i + 1, i) for i in range(50)]
    one, again, other = (plan(lines, least=2, most=6, variants=2, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    sizes = [len(bundle.parts) for bundle in one]
    assert max(sizes) == 6 and set(sizes) >= {2, 3, 4, 5}
    counted = sorted((p.line.line_index, p.variant) for b in one for p in b.parts)
    assert counted == sorted(itertools.product(range(50), range(2)))
    assert plan(lines)[7].parts == (Part(lines[7]),)
    with pytest.raises(ValueError, match="join is for lines of .jsonl files, and b.txt is one text"):
        plan([*lines, Line("b.txt", 0, 1, None)], least=2, most=2)
    with pytest.raises(ValueError, match="a needle needs another line"):
        plan(lines[:1], least=2, most=2, join_as="needle")


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"join": 2, "join_least": 3}, "join_least 3 is more than join 2"),
        ({"join_as": "video"}, "join_as 'video' of one line"),
        ({"mirror": True}, "mirror changes variants"),
        ({"variants": 2}, "variants 2 of pictures need a vision_tokenizer"),
        ({"variants": 0}, "variants 0 must be at least 1"),
        ({"variants": 2, "vision_tokenizer": "sample", "fit": "centre"}, "use fit crop or pad"),
        ({"heldout_share": 2.0}, "heldout_share 2.0 must lie between"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, options, fault):
    with pytest.raises(ValueError, match=fault):
        tokenize("a.jsonl", tmp_path / "set", **options)
