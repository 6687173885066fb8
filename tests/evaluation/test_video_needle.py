"""A needle in a video: the right caption is the only one in it, at the depth that is asked, whatever the mesh."""

import dataclasses
import json

import numpy as np
import pytest

from ringjax import cli
from ringjax.evaluation.choices import Judge, Verdict
from ringjax.evaluation.eval_command import run_eval
from ringjax.evaluation.heldout import HeldOut
from ringjax.evaluation.video_needle import VideoNeedleTask
from ringjax.evaluation.vision_config import VideoNeedleConfig
from ringjax.inference.trained import TrainedRun
from tests.evaluation.vision_run import WORDS, codes, learned_run, write_lines


@pytest.fixture
def given(tmp_path):
    """Clips of all twelve, three frames each; a third of the choices, so that some are left for the video."""
    lines = write_lines(tmp_path / "clips.jsonl", range(12), frames=3)
    return {"model": str(learned_run()), "data": (str(lines),), "progress": "none", "choices": 4, "concepts": 3}


def needle(given, folder, **changes):
    options = {"lengths": (150, 300), "depths": (0.0, 50.0, 100.0), "per_cell": 2, "allow_beyond": True}
    return VideoNeedleConfig(output=str(folder), **given | options | changes)


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][1:]


def seen_words(frames):
    """Which captions a video shows, frame by frame."""
    by_codes = {tuple(codes(i)): word for i, word in enumerate(WORDS)}
    return [by_codes[tuple(frame)] for frame in frames.tolist()]


def task(given, folder, **changes):
    config = needle(given, folder, **changes)
    heldout = HeldOut.open(TrainedRun.load(config.model), config)
    return VideoNeedleTask(config, heldout, heldout)


@pytest.mark.parametrize("length", [150, 300])
def test_only_the_right_caption_is_in_the_video(given, tmp_path, length):
    made = task(given, tmp_path)
    for cell in made.cells(length):
        video = made.ask(cell)
        words, right = seen_words(video.frames), video.choices.captions[video.choices.right]
        assert set(words) & set(video.choices.captions) == {right} and words.count(right) == 3
        assert len(set(words) - {right}) <= 3 and set(seen_words(video.without)) <= set(words) - {right}
        place = words.index(right)
        assert place % 3 == 0 and abs(place - cell.depth / 100 * (len(words) - 3)) <= 2
        assert len(video.frames) == len(video.without)
        differ = (video.frames != video.without).any(axis=1)
        assert differ[place : place + 3].all() and differ.sum() == 3
        prompt = made.needles.run.prompts.see([video.frames], made.config.prompt)
        longest = max(len(made.needles.run.tokenizer.encode(word)) for word in WORDS)
        assert length - 5 < len(prompt) + longest + 1 <= length
        again = made.ask(cell)
        assert again.choices == video.choices
        np.testing.assert_array_equal(again.frames, video.frames)
    assert len({made.ask(cell).choices.right for cell in made.cells(length)}) > 1


def test_a_haystack_of_its_own(given, tmp_path):
    hay = write_lines(tmp_path / "hay.jsonl", [0, 1, 2, 3, 4, 5, 6], frames=2)
    config = needle(given, tmp_path, haystack=(str(hay),))
    run = TrainedRun.load(config.model)
    sets = [HeldOut.open(run, dataclasses.replace(config, data=data)) for data in (config.data, (str(hay),))]
    made = VideoNeedleTask(config, *sets)
    for cell in made.cells(150):
        video = made.ask(cell)
        right = video.choices.captions[video.choices.right]
        others = set(seen_words(video.frames)) - {right}
        assert others <= set(WORDS[:7]) - set(video.choices.captions)
    run_eval(config)


def test_one_who_sees_it_all(given, tmp_path, monkeypatch):
    """Likelihoods by what the prompt really shows: 100 %; a model that saw short clips only: less."""

    def perfect(self, prompt, captions, alone=None):
        def count(example):
            frames = example.tokens[example.modality].reshape(-1, 5)[:, :4]
            return np.array([seen_words(frames).count(caption) for caption in captions], float)

        return Verdict(count(prompt), np.ones(len(captions)), count(alone))

    monkeypatch.setattr(Judge, "after", perfect)
    shown = run_eval(needle(given, tmp_path))
    rows = [row.split(" | ") for row in shown.splitlines() if row.startswith("| video needle")]
    assert [row[1:5] for row in rows] == [
        [n, by, "100%", "6"] for n in ("150", "300") for by in ("sum", "mean", "lift")
    ]
    for name in ("report.html", "report.md", "summary.json", "heat_map.png", "accuracy.png"):
        assert (tmp_path / name).stat().st_size > 200


def test_it_goes_on_and_a_ring_changes_nothing(given, tmp_path):
    run_eval(needle(given, tmp_path / "one", lengths=(150,)))
    path = tmp_path / "parts" / "results.jsonl"
    run_eval(needle(given, tmp_path / "parts", lengths=(150,), mesh="1,2,1,4"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))  # a measure of a cell is missing
    run_eval(needle(given, tmp_path / "parts", lengths=(150,), mesh="1,1,2,4"))
    found = [records(tmp_path / name) for name in ("one", "parts")]
    for one, ring in zip(*found, strict=True):
        assert all(one[name] == ring[name] for name in ("method", "depth", "index", "choices", "tokens", "frames"))
        for name in ("log_likelihoods", "alone"):
            np.testing.assert_allclose(one[name], ring[name], rtol=1e-4, atol=3e-4)
    with pytest.raises(ValueError, match="is of another evaluation: prompt"):
        run_eval(needle(given, tmp_path / "one", prompt="What is new?"))


def test_rope_is_stretched(given, tmp_path):
    for name, changes in {
        "plain": {},
        "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0, "allow_beyond": False},
        "theta": {"rope_theta": 1e6, "allow_beyond": False},
    }.items():
        run_eval(needle(given, tmp_path / name, lengths=(150,), depths=(50.0,), per_cell=1, **changes))
    plain, yarn, theta = ([r["log_likelihoods"] for r in records(tmp_path / n)] for n in ("plain", "yarn", "theta"))
    assert plain != yarn != theta != plain


def test_refused(given, tmp_path):
    with pytest.raises(ValueError, match="length 300 is beyond the rows of 64 tokens"):
        run_eval(needle(given, tmp_path, allow_beyond=False))
    with pytest.raises(
        ValueError, match="has 12 different captions of clips, and 10 choices and 3 concepts .* need 13"
    ):
        run_eval(needle(given, tmp_path, choices=10))
    with pytest.raises(ValueError, match="length 20: the needle's 3 frames alone fill the video"):
        run_eval(needle(given, tmp_path, lengths=(20,)))
    few = write_lines(tmp_path / "few.jsonl", range(6), frames=3)
    with pytest.raises(ValueError, match="has 6 different captions of clips; 3 of them beside 4 choices need 7"):
        run_eval(needle(given, tmp_path, haystack=(str(few),)))
    pictures = write_lines(tmp_path / "pictures.jsonl", range(12))
    with pytest.raises(ValueError, match="holds no clips"):
        run_eval(needle(given | {"data": (str(pictures),)}, tmp_path))
    for message, changes in {
        "a video is made of clips alone": {"kinds": ("clips", "pictures")},
        "say how many with --per_cell": {"count": 3},
        "belong together": {"rope_scaling": "yarn"},
        "lengths 9 9: each once": {"lengths": (9, 9)},
        "must be percents": {"depths": (101.0,)},
        "concepts 0 must be at least 1": {"concepts": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            needle(given, tmp_path, **changes)


def test_usage(capsys):
    assert cli.main(["eval", "video_needle", "--help"]) == 0
    assert "--concepts" in capsys.readouterr().out
