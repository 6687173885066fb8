import dataclasses

import numpy as np
import pytest
from PIL import Image

from ringjax import cli
from ringjax.data import samples
from ringjax.data.config import SourceConfig
from ringjax.data.samples_vision import digit_rows
from ringjax.inference.command import GenerateConfig
from ringjax.inference.sampling import Sampling
from ringjax.inference.trained import TrainedRun
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
    assert cli.main(["generate", str(tiny_run()), "--picture", str(picture), "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().err == ""


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
        ([], "nothing to begin with; give --prompt, --prompt_file or --picture"),
        (["--draw", "a.png"], "draw needs a prompt"),
        (["--draw", "a.jpg", "--prompt", "a"], "must be the name of a .png file"),
        (["--draw", "a.png", "--prompt", "a", "--picture", "b.png"], "two different tasks"),
        (["--prompt", "a", "--guidance", "2"], "guidance 2.0 is for drawing only"),
        (["--promt", "a"], "did you mean 'prompt'"),
        (["--prompt", "a", "--temperature", "warm"], "temperature"),
        (["--prompt", "a", "--top_p", "2"], "top_p 2.0 must be above 0"),
    ],
)
def test_wrong_calls_say_so(arguments, message, capsys):
    assert cli.main(["generate", "/no/run", *arguments]) != 0
    assert message in capsys.readouterr().err


def test_a_missing_run_or_picture_says_so(capsys):
    assert cli.main(["generate", "/no/run", "--prompt", "a"]) == 1
    assert "/no/run is no run folder" in capsys.readouterr().err
    assert cli.main(["generate", str(tiny_run()), "--picture", "/no/picture.png"]) == 1
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
    assert GenerateConfig("run", picture="a.png").sampling() == Sampling(temperature=0)
    assert GenerateConfig("run", "seven", draw="a.png").sampling() == Sampling(temperature=0.7, guidance=2.0)
    assert GenerateConfig("run", "It was", top_k=5).sampling() == Sampling(temperature=0.7, top_k=5)
