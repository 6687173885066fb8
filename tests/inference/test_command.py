import dataclasses

import numpy as np
import pytest
from PIL import Image

from ringjax import cli
from ringjax.data import samples
from ringjax.data.config import SourceConfig
from ringjax.data.pictures import read_clip
from ringjax.data.samples_vision import digit_rows
from ringjax.inference import prefill
from ringjax.inference.generate_config import GenerateConfig
from ringjax.inference.run_prompts import RunPrompts
from ringjax.inference.sampling import Sampling
from ringjax.inference.trained import TrainedRun
from tests.inference.small import small_model
from tests.tiny_run import tiny_run


def test_text_goes_on(capsys):
    arguments = ["generate", str(tiny_run()), "--prompt", "7", "--max_new_tokens", "12", "--temperature", "1"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("7") and len(first) > 4
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_a_picture_is_drawn_and_put_into_words(tmp_path, capsys):
    picture = tmp_path / "seven.png"
    assert cli.main(["generate", str(tiny_run()), "--prompt", "seven", "--draw", str(picture)]) == 0
    assert "28 × 28 pixels" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.size == (28, 28) and image.mode == "L"
    assert cli.main(["generate", str(tiny_run()), "--image", str(picture), "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_a_clip_is_drawn_and_seen(tmp_path, capsys):
    clip = tmp_path / "new" / "seven.webp"
    drawing = ["--prompt", "seven", "--draw", str(clip), "--frames", "3", "--fps", "8"]
    assert cli.main(["generate", str(tiny_run()), *drawing]) == 0
    assert "3 frames of 28 × 28 pixels, 8 a second" in capsys.readouterr().out
    assert read_clip(clip, 32, channels=1, fit="centre").shape == (3, 28, 28)
    seeing = ["--image", str(clip), "--image", str(clip), "--max_frames", "2", "--prompt", "and"]
    assert cli.main(["generate", str(tiny_run()), *seeing, "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_images_come_in_order_before_the_prompt(monkeypatch):
    run = TrainedRun.load(tiny_run())
    rows, _ = digit_rows("heldout")
    one, two = np.stack([rows[0]["vision"], rows[1]["vision"]]), rows[2]["vision"][None]
    seen = run.prompts.see([one, two], "six")
    start, end = run.tokenizer.marker("<vision>"), run.tokenizer.marker("</vision>")
    words = run.tokenizer.encode("six")
    assert seen.tokens.tolist() == [
        run.tokenizer.bos_id, *start, *one[0], 64, *one[1], 65, *end, *start, *two[0], 65, *end, *words
    ]  # fmt: skip
    prompts = []
    monkeypatch.setattr(
        "ringjax.inference.trained.generate_text", lambda model, rows, **_: prompts.extend(rows) or [np.array([1])]
    )
    assert run.answer([one, two], prompt="six") == ""
    np.testing.assert_array_equal(prompts[0].tokens, seen.tokens)
    whole = dataclasses.replace(run, data=dataclasses.replace(run.data, bidirectional_frames=True))
    assert whole.prompts.see([two], "six").ahead.max() == 16


def test_text_and_pictures_in_one_stream(tmp_path, capsys, monkeypatch):
    """A prompt that opens vision is followed by a picture, which is written to the folder."""
    monkeypatch.setattr(RunPrompts, "text", RunPrompts.picture)
    folder = tmp_path / "out"
    arguments = ["generate", str(tiny_run()), "--prompt", "seven", "--interleaved", "--output", str(folder)]
    arguments += ["--max_frames", "1", "--max_new_tokens", "40", "--seed", "2"]
    for number in (1, 2):  # nothing is overwritten
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert out.startswith("seven\n[") and f"picture_{number}.png: 28 × 28 pixels]" in out
        with Image.open(folder / f"picture_{number}.png") as image:
            assert image.size == (28, 28)


def test_a_run_writes_parts(monkeypatch):
    run = TrainedRun.load(tiny_run())
    options = dict(max_new_tokens=40, max_frames=2, sampling=Sampling(seed=1))
    clip = run.to_codes(samples.digits("heldout").images[:2])
    (row,) = run.write(["a"], clips=[clip], **options)
    assert isinstance(row[0], str)
    monkeypatch.setattr(RunPrompts, "text", RunPrompts.picture)
    rows = run.write(["seven", "a"], **options)
    assert len(rows) == 2
    for row in rows:
        assert row[0].shape in ((1, 16), (2, 16)) and row[0].max() < 64
        assert all(isinstance(part, str) or part.shape[1] == 16 for part in row)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (3.0, 4)])
def test_the_batch_is_doubled_only_for_guidance(guidance, rows, monkeypatch):
    """`draw` gives the prompts without words in any case."""
    sizes = []
    real = prefill.batch_prompts
    monkeypatch.setattr(prefill, "batch_prompts", lambda rows, *rest: sizes.append(len(rows)) or real(rows, *rest))
    TrainedRun.load(tiny_run()).draw(["one", "two"], sampling=Sampling(guidance=guidance))
    assert sizes == [rows]


def test_a_picture_is_seen_as_in_training():
    """A held-out digit has the codes that the loader gives it."""
    run = TrainedRun.load(tiny_run())
    images, _ = samples.digits("heldout")
    codes = run.to_codes(images[:2])
    assert codes.shape == (2, 16) and codes.min() >= 0 and codes.max() < 64
    rows, _ = digit_rows("heldout")
    np.testing.assert_array_equal(codes, [row["vision"] for row in rows[:2]])


def test_drawings_depend_on_the_seed_only():
    run = TrainedRun.load(tiny_run())
    one, again = (run.draw(["one", "two"], sampling=Sampling(guidance=2.0, seed=4)) for _ in range(2))
    other = run.draw(["one", "two"], sampling=Sampling(guidance=2.0, seed=5))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to begin with; give --prompt, --prompt_file or --image"),
        (["--draw", "a.png"], "draw needs a prompt"),
        (["--draw", "a.jpg", "--prompt", "a"], "'a.jpg' must be the name of a .png file: a picture is written"),
        (["--draw", "a.png", "--prompt", "a", "--frames", "3"], "a .webp file: a clip of 3 frames is written"),
        (["--draw", "a.webp", "--prompt", "a"], "'a.webp' must be the name of a .png file"),
        (["--draw", "a.png", "--prompt", "a", "--interleaved"], "draw and interleaved are two different tasks"),
        (["--prompt", "a", "--frames", "3"], "frames 3 is for drawing only"),
        (["--prompt", "a", "--max_frames", "3"], "max_frames 3 is for --image and --interleaved"),
        (["--prompt", "a", "--fps", "0"], "fps 0.0 must be above 0"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens 0 must be at least 1"),
        (["--prompt", "a", "--repetition_penalty", "0"], "repetition_penalty 0.0 must be above 0"),
        (["--prompt", "a", "--prompt_form", "gpt"], "prompt_form"),
        (["--draw", "a.png", "--prompt", "a", "--image", "b.png"], "two different tasks"),
        (["--prompt", "a", "--guidance", "2"], "guidance 2.0 is for drawing only"),
        (["--promt", "a"], "did you mean 'prompt'"),
        (["--prompt", "a", "--temperature", "warm"], "temperature"),
        (["--prompt", "a", "--top_p", "2"], "top_p 2.0 must be above 0"),
    ],
)
def test_wrong_calls_say_so(arguments, message, capsys):
    assert cli.main(["generate", "/no/run", *arguments]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--image", "{text}"], 65, "picture {text} is none of PNG, JPEG, WEBP, GIF"),
        (["--image", "{folder}"], 65, "folder {folder} holds no frames"),
        (["--prompt", "a", "--stop", "b"], 1, "stop 'b' is for published models"),
        (["--prompt", "a", "--stop_tokens", "<|im_end|>"], 1, "stop token '<|im_end|>' is no special token of this"),
        (["--prompt", "a", "--stop_tokens", "</S>"], 1, "it has </s>, "),
    ],
)
def test_what_a_run_cannot_take(arguments, code, message, tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    names = dict(text=tmp_path / "seven.png", folder=tmp_path / "frames")
    names["text"].write_text("not a picture")
    assert cli.main(["generate", str(tiny_run()), *(argument.format(**names) for argument in arguments)]) == code
    assert message.format(**names) in capsys.readouterr().err


def test_a_run_of_text_says_so(monkeypatch, capsys):
    run = TrainedRun.load(tiny_run())
    text_only = dataclasses.replace(run, model=small_model(vision_vocab_size=0))
    monkeypatch.setattr(TrainedRun, "load", lambda *_, **__: text_only)
    for arguments in (["--image", "a.png"], ["--prompt", "a", "--draw", "a.png"], ["--prompt", "a", "--interleaved"]):
        assert cli.main(["generate", "run", *arguments]) == 1
        assert "this run is a model of text (vision_vocab_size 0)" in capsys.readouterr().err


def test_a_missing_run_or_picture_says_so(capsys):
    assert cli.main(["generate", "/no/run", "--prompt", "a"]) == 1
    assert "/no/run is no run folder" in capsys.readouterr().err
    assert cli.main(["generate", str(tiny_run()), "--image", "/no/picture.png"]) == 65
    assert "picture /no/picture.png does not exist" in capsys.readouterr().err
    assert cli.main(["generate"]) == 0  # the help


def test_another_image_tokenizer_is_refused():
    run = TrainedRun.load(tiny_run())
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, codes_per_frame=256))
    with pytest.raises(ValueError, match="has 16 codes a picture of 64 and the run was trained with codes_per"):
        _ = other.vqgan
    unknown = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=(SourceConfig("sample:prose"),)))
    with pytest.raises(ValueError, match="does not say which image tokenizer made its codes; name it"):
        _ = unknown.vqgan


def test_defaults_of_the_tasks():
    assert GenerateConfig("run", image=("a.png",)).sampling() == Sampling(temperature=0)
    assert GenerateConfig("run", "seven", draw="a.png").sampling() == Sampling(temperature=0.7, guidance=2.0)
    assert GenerateConfig("run", "It was", top_k=5).sampling() == Sampling(temperature=0.7, top_k=5)
