"""`ringjax eval captions | drawings | gallery`: perfect and blind models, going on, what cannot be asked."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ringjax import cli
from ringjax.data.config import DataConfig
from ringjax.data.errors import DataError
from ringjax.data.heldout import heldout
from ringjax.evaluation import drawings, gallery
from ringjax.evaluation.choice_report import Share
from ringjax.evaluation.choices import draw_choices
from ringjax.evaluation.eval_command import run_eval
from ringjax.evaluation.heldout import HeldOut
from ringjax.evaluation.vision_config import CaptionsConfig, DrawingsConfig, GalleryConfig
from ringjax.inference.trained import TrainedRun
from tests.evaluation import small
from tests.evaluation.vision_run import CODES, WORDS, learned_run, write_lines
from tests.inference.small import small_model
from tests.tiny_run import tiny_run

ALL = range(12)


@pytest.fixture
def lines(tmp_path):
    """Pictures of all twelve, and clips of the first eleven, in one file."""
    path = write_lines(tmp_path / "heldout.jsonl", ALL)
    clips = write_lines(tmp_path / "clips.jsonl", range(11), frames=3)
    path.write_text(path.read_text() + clips.read_text())
    return str(path)


def test_several_files_and_a_split(lines, tmp_path):
    """As one file; of a split, the captions that `ringjax tokenize` keeps aside."""
    rows = Path(lines).read_text().splitlines(keepends=True)
    parts = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, some in zip(parts, (rows[:5], rows[5:])):
        path.write_text("".join(some))
    run, whole = TrainedRun.load(learned_run()), captions(lines, tmp_path)
    several = dataclasses.replace(whole, data=tuple(map(str, parts)))
    one, two = HeldOut.open(run, whole), HeldOut.open(run, several)
    assert one.fingerprint == two.fingerprint
    assert [(x.index, x.caption, x.kind) for x in one.lines] == [(x.index, x.caption, x.kind) for x in two.lines]
    sides = {}
    for split in ("heldout", "train"):
        found = HeldOut.open(run, dataclasses.replace(several, split=split, heldout_share=0.4))
        sides[split] = set(found.captions("pictures"))
        assert [line.index for line in found.lines] == list(range(len(found.lines)))
    assert sides["heldout"] == {word for word in WORDS if heldout(word, 0.4)} and all(sides.values())
    assert sides["heldout"] | sides["train"] == set(WORDS) and not sides["heldout"] & sides["train"]
    with pytest.raises(ValueError, match="holds no pictures or clips in split heldout"):
        HeldOut.open(run, dataclasses.replace(several, split="heldout", heldout_share=0.0))
    digits = TrainedRun.load(tiny_run())
    with pytest.raises(ValueError, match="split train of sample:digits"):
        HeldOut.open(digits, CaptionsConfig(str(tiny_run()), split="train"))


def captions(data, folder, run=learned_run, **changes):
    return CaptionsConfig(str(run()), output=str(folder), data=data and (data,), progress="none", **changes)


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][1:]


def timeless(found):
    return [{k: v for k, v in record.items() if k not in ("seconds", "compiled")} for record in found]


def test_a_model_that_knows_is_always_right(lines, tmp_path):
    shown = run_eval(captions(lines, tmp_path / "out"))
    rows = [row.split(" | ") for row in shown.splitlines() if "| real |" in row]
    assert [(row[0], row[2], row[3][:6]) for row in rows] == [
        ("| pictures", "12", "100.0%"),
        ("| clips", "11", "100.0%"),
    ]
    for record in records(tmp_path / "out"):
        assert len(set(record["choices"])) == 10 and record["text"] == record["answers"][0] in record["choices"]
    for name in ("report.html", "report.md", "summary.json", "choices.png"):
        assert (tmp_path / "out" / name).stat().st_size > 200


def test_by_the_codes_of_the_picture(lines, tmp_path):
    shown = run_eval(captions(lines, tmp_path / "out", by="codes"))
    head, row = (next(x for x in shown.splitlines() if mark in x).split(" | ") for mark in ("questions", "| pictures"))
    assert head[3] == "right by codes (95 %)" and row[3].startswith("100.0%")
    for record in records(tmp_path / "out"):
        assert record["text"] == record["choices"][int(np.argmax(record["of_codes"]))]
        assert set(record["right"]) == {"sum", "mean", "lift", "codes"}
    # Pictures are drawn after `words`, clips after `clip_words`.
    run_eval(captions(lines, tmp_path / "said", by="codes", words="Draw {caption}"))
    for record, said in zip(records(tmp_path / "out"), records(tmp_path / "said"), strict=True):
        assert (record["of_codes"] == said["of_codes"]) == (record["part"] == "clips")
        assert record["log_likelihoods"] == said["log_likelihoods"]
    with pytest.raises(ValueError, match="words 'A thing' must hold {caption}"):
        captions(lines, tmp_path, words="A thing")


def test_a_model_that_knows_nothing_is_at_chance(tmp_path):
    """Ten captions of equally many digits each: whatever a blind model prefers is right once in ten."""
    run_eval(captions((), tmp_path, tiny_run, count=200))
    found = records(tmp_path)
    share = Share.of(sum(record["score"] == 1 for record in found), len(found))
    assert share.count == 200 and share.low < 0.1 < share.high
    assert len({record["choices"].index(record["answers"][0]) for record in found}) == 10  # the right one is anywhere


def test_a_picture_that_says_something_else_is_not_recognised(lines, tmp_path):
    rows = [json.loads(line) for line in Path(lines).read_text().splitlines()]
    for row in rows:
        row["vision"] = [(code + 1) % CODES for code in row["vision"]]  # each shows the next one's picture
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    run_eval(captions(str(other), tmp_path / "out"))
    assert sum(record["score"] for record in records(tmp_path / "out")) <= 3


def test_an_evaluation_goes_on_and_grows(lines, tmp_path):
    run_eval(captions(lines, tmp_path / "whole"))
    run_eval(captions(lines, tmp_path / "parts", count=4))
    path = tmp_path / "parts" / "results.jsonl"
    assert len(records(tmp_path / "parts")) == 8
    path.write_bytes(path.read_bytes()[:-7])  # a line that was cut is asked again
    run_eval(captions(lines, tmp_path / "parts"))
    by_place = lambda folder: sorted(timeless(records(folder)), key=lambda r: (r["part"], r["index"]))  # noqa: E731
    assert by_place(tmp_path / "parts") == by_place(tmp_path / "whole")
    with pytest.raises(ValueError, match="is of another evaluation: seed is 0 there and 1 here"):
        run_eval(captions(lines, tmp_path / "parts", seed=1))
    more = write_lines(tmp_path / "more.jsonl", range(11))
    with pytest.raises(ValueError, match="is of another evaluation: heldout"):
        run_eval(captions(str(more), tmp_path / "parts"))


@pytest.mark.slow
def test_a_mesh_changes_no_answer(lines, tmp_path):
    run_eval(captions(lines, tmp_path / "one"))
    run_eval(captions(lines, tmp_path / "ring", mesh="2,1,1,4"))
    for one, ring in zip(records(tmp_path / "one"), records(tmp_path / "ring"), strict=True):
        assert one["choices"] == ring["choices"]
        np.testing.assert_allclose(one["log_likelihoods"], ring["log_likelihoods"], rtol=1e-4, atol=2e-4)


def test_choices_depend_on_seed_and_line_alone(lines, tmp_path):
    run = TrainedRun.load(learned_run())
    found = HeldOut.open(run, captions(lines, tmp_path))
    first, last = found.lines[0], found.lines[11]
    assert draw_choices(found, last, 10, 3) == draw_choices(found, last, 10, 3)
    assert draw_choices(found, last, 10, 3) != draw_choices(found, last, 10, 4)
    drawn = [draw_choices(found, first, 10, seed) for seed in range(60)]
    assert {choices.right for choices in drawn} == set(range(10))
    assert {caption for choices in drawn for caption in choices.captions} == set(WORDS)
    assert all(choices.captions[choices.right] == first.caption for choices in drawn)
    assert all(len(set(choices.captions)) == 10 for choices in drawn)
    few, many = found.chosen(3), found.chosen(7)
    assert [line.kind for line in few] == ["pictures"] * 3 + ["clips"] * 3
    assert {line.place for line in few} <= {line.place for line in many}


@pytest.mark.parametrize(
    "right, count, low, high", [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson(right, count, low, high):
    np.testing.assert_allclose(Share.of(right, count)[2:], (low, high), atol=1e-4)


class NoPixels:
    """Codes as they are, for runs whose codes no image tokenizer has made."""

    class config:
        resolution, channels, codes = 8, 1, CODES


@pytest.fixture
def coded(monkeypatch):
    monkeypatch.setattr(TrainedRun, "vqgan", NoPixels)
    monkeypatch.setattr(drawings, "require_same_pictures", lambda *_: None)
    monkeypatch.setattr("ringjax.evaluation.vision_command.require_same_pictures", lambda *_: None)


def drawn(data, folder, run=learned_run, **changes):
    options = {"see": "codes", "temperature": 0.0, "guidance": 1.0, "batch": 4, **changes}
    return DrawingsConfig(str(run()), output=str(folder), data=data and (data,), progress="none", **options)


def test_drawings_of_a_model_that_can_draw(lines, tmp_path, coded):
    shown = run_eval(drawn(lines, tmp_path / "out", per_caption=2))
    rows = {tuple(row.split(" | ")[:2]): row.split(" | ")[2:4] for row in shown.splitlines()[2:] if " | " in row}
    assert {what: share[:6] for what, (_, share) in rows.items()} == {
        (part, shown): "100.0%" for part in ("| pictures", "| clips") for shown in ("drawn", "real")
    }
    assert rows["| pictures", "drawn"][0] == "24" and rows["| pictures", "real"][0] == "12"
    found = records(tmp_path / "out")
    assert {len(r["codes"]) for r in found if r["method"] == "drawn" and r["part"] == "clips"} == {12}
    run_eval(drawn(lines, tmp_path / "parts", per_caption=2))
    path = tmp_path / "parts" / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    run_eval(drawn(lines, tmp_path / "parts", per_caption=2))  # a batch of which a part is missing is drawn again
    key = lambda r: (r["part"], r["method"], r["index"])  # noqa: E731
    assert sorted(timeless(records(tmp_path / "parts")), key=key) == sorted(timeless(found), key=key)


def test_drawings_of_a_model_that_draws_the_wrong_thing(lines, tmp_path, coded, monkeypatch):
    """The control stays right: the judge is not to blame."""
    real = TrainedRun.draw_clips
    monkeypatch.setattr(
        TrainedRun,
        "draw_clips",
        lambda *a, **o: (real(*a, **o) + 3) % CODES,  # everybody's picture is another's
    )
    run_eval(drawn(lines, tmp_path, kinds=("pictures",)))
    found = records(tmp_path)
    assert all(r["score"] == 1 for r in found if r["method"] == "real")
    assert sum(r["score"] for r in found if r["method"] == "drawn") <= 3


def test_drawings_through_pixels(tmp_path):
    """What the judge sees was a picture in between, of drawings and of real ones."""
    config = drawn((), tmp_path, tiny_run, see="pixels", count=6, guidance=2.0, temperature=1.0)
    run_eval(config)
    run = TrainedRun.load(tiny_run())
    found = records(tmp_path)
    assert len(found) == 12
    first = next(r for r in found if r["method"] == "drawn")
    codes = np.array(first["codes"])[None]
    again = run.to_codes(run.to_pictures(codes))
    np.testing.assert_array_equal(drawings._seen(config, run, run, codes), again)
    assert (again != codes).any()  # a random picture is not what it seems
    with pytest.raises(ValueError, match="is of another evaluation: count is 6 there and 7 here"):
        run_eval(dataclasses.replace(config, count=7))


def test_gallery(tmp_path, capsys):
    path = tmp_path / "new" / "gallery.png"
    arguments = ["eval", "gallery", str(tiny_run()), "--output", str(path), "--pictures", "4", "--columns", "2"]
    assert cli.main([*arguments, "--batch", "4"]) == 0
    assert f"{path}: 486 × 350 pixels" in capsys.readouterr().out
    with Image.open(path) as picture:
        first = np.asarray(picture.convert("L"))
    assert (first < 128).mean() > 0.05  # digits are white on black
    assert not path.with_name("gallery_clips.webp").exists()
    assert cli.main([*arguments, "--batch", "4", "--seed", "1"]) == 0
    with Image.open(path) as picture:
        assert (np.asarray(picture.convert("L")) != first).any()


def test_clips_play(tmp_path):
    rows = [json.dumps({"caption": word, "vision": [i] * 16 + [i + 1] * 16}) for i, word in enumerate(WORDS)]
    (tmp_path / "clips.jsonl").write_text("\n".join(rows))
    config = GalleryConfig(
        str(tiny_run()), output=str(tmp_path / "all.png"), data=(str(tmp_path / "clips.jsonl"),), clips=2, batch=2
    )
    assert run_eval(config) == f"{tmp_path}/all_clips.webp: 2 frames"
    with Image.open(tmp_path / "all_clips.webp") as clip:
        assert clip.n_frames == 2 and clip.size == (2 * 228 + 30, 10 + 10 + 32 + 112 + 16)


def test_cards_show_file_code_and_drawing(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.new("L", (28, 28), 255 * number).save(folder / f"{number}.png")
    rows = [json.dumps({"caption": word, "file": f"{i}.png"}) for i, word in enumerate(WORDS[:2])]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    config = GalleryConfig(
        str(tiny_run()), output=str(tmp_path / "a.png"), data=(str(folder / "captions.jsonl"),), batch=2
    )
    found = HeldOut.open(TrainedRun.load(tiny_run()), config)
    cards = gallery._cards(config, found, found.chosen(2))
    assert [card.caption for card in cards] == list(WORDS[:2])
    for number, card in enumerate(cards):
        assert [name for name, _ in card.tiles] == ["real", "coded", "drawn"]
        assert (card.tiles[0][1] == 255 * number).all() and card.tiles[1][1].shape == (1, 28, 28, 3)


REFUSED = {
    "choices 1 must be at least 2": {"choices": 1},
    "kinds: name pictures": {"kinds": ()},
    "count 0 must be at least 1": {"count": 0},
    "kinds clips clips: each once": {"kinds": ("clips", "clips")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_options(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        captions((), tmp_path, **REFUSED[message])


def test_wrong_drawings(tmp_path):
    for message, changes in {
        r"words 'a cat' must hold \{caption\}": {"words": "a cat"},
        "per_caption 5 must be 1 to batch 4": {"per_caption": 5},
        "judge_image_tokenizer x without a judge": {"judge_image_tokenizer": "x"},
        "temperature -1": {"temperature": -1.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            drawn((), tmp_path, **changes)
    with pytest.raises(ValueError, match="must be the name of a .png file"):
        GalleryConfig("run", output="gallery.webp")
    with pytest.raises(ValueError, match="nothing to show"):
        GalleryConfig("run", pictures=0, clips=0)


def test_what_cannot_be_asked(lines, tmp_path):
    few = write_lines(tmp_path / "few.jsonl", [0, 1, 1, 2])
    with pytest.raises(ValueError, match="the held-out pictures have 3 different captions, and 10 choices need 10"):
        run_eval(captions(str(few), tmp_path))
    run_eval(captions(str(few), tmp_path / "three", choices=3))
    assert all(record["score"] == 1 for record in records(tmp_path / "three"))
    with pytest.raises(ValueError, match="was not trained on the digits; name held-out pictures with --data"):
        run_eval(captions((), tmp_path))
    with pytest.raises(ValueError, match="does not say which image tokenizer made its codes"):
        run_eval(drawn(lines, tmp_path))
    with pytest.raises(FileNotFoundError, match="no run folder"):
        run_eval(dataclasses.replace(captions(lines, tmp_path), model=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="this run is a model of text"):
        HeldOut.open(TrainedRun(small_model(vision_vocab_size=0), DataConfig()), captions(lines, tmp_path))
    with pytest.raises(ValueError, match="is a published model, which knows no codes"):
        run_eval(dataclasses.replace(captions(lines, tmp_path), model=str(small.folder(tmp_path))))


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"caption": " ", "vision": [1, 2, 3, 4]}, "field 'caption' must be a caption, not ' '"),
        ({"caption": "a"}, "neither codes"),
        ({"caption": "a", "vision": [1, 2, 3]}, "not a whole number of frames of 4"),
        ({"caption": "a", "vision": [1, 2, 3, 99]}, "has code 99"),
        ({"caption": "a", "file": "nothing.png"}, "does not exist"),
        ({"caption": "a", "file": "heldout.jsonl"}, "is none of PNG"),
    ],
)
def test_faulty_lines_are_named(row, fault, tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"caption": "b", "vision": [1, 2, 3, 4]}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"line 3.*{fault}"):
        run_eval(captions(str(path), tmp_path / "out"))


def test_judges(tmp_path, monkeypatch):
    """Another run may judge, if it sees pictures like these; the same codes only with the same tokenizer."""
    run_eval(drawn((), tmp_path / "out", tiny_run, see="pixels", count=4, judge=str(tiny_run())))
    assert len(records(tmp_path / "out")) == 8
    one, other = TrainedRun.load(tiny_run()), TrainedRun.load(tiny_run())
    drawings.require_same_pictures(one, other, "codes")
    monkeypatch.setattr("ringjax.models.vqgan.vqgan_fingerprint", lambda vqgan: id(vqgan))
    drawings.require_same_pictures(one, other, "pixels")
    with pytest.raises(ValueError, match="see 'codes' with a judge of another image tokenizer"):
        drawings.require_same_pictures(one, other, "codes")
    monkeypatch.setattr(TrainedRun, "vqgan", property(lambda run: NoPixels if run is other else one.__dict__["vqgan"]))
    with pytest.raises(ValueError, match="takes pictures of 8 pixels and 1 channels, and those drawn have 32 and 1"):
        drawings.require_same_pictures(one, other, "pixels")


def test_usage(capsys):
    assert cli.main(["eval", "captions"]) == 2
    assert "takes one MODEL" in capsys.readouterr().err
    assert cli.main(["eval", "drawings", "--help"]) == 0
    assert "--guidance" in capsys.readouterr().out
