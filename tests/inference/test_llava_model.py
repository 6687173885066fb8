"""Questions about pictures, answered by a tiny LLaVA with a tokenizer."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from ringjax import cli
from ringjax.attention import Reach
from ringjax.inference.llava_model import IMAGE, LlavaModel, read_picture
from ringjax.inference.pictures_out import write_frames
from ringjax.inference.sampling import Sampling
from ringjax.models import Parallel
from ringjax.models.features import feature_index
from ringjax.models.transformer import unstacked
from tests.interop import llava_small
from tests.interop.tokenizers_small import SPECIALS, tokenizer_json
from tests.models import cases

IMAGE_ID, NEW = 259, 6  # after three special tokens and the bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    text = {**llava_small.FAMILIES["llava"]["text_config"], "vocab_size": 260, "eos_token_id": 2, "bos_token_id": 1}
    llava_small.write(path, {**llava_small.FAMILIES["llava"], "text_config": text, "image_token_index": IMAGE_ID})
    (path / "tokenizer.json").write_text(tokenizer_json(IMAGE))
    settings = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "preprocessor_config.json").write_text(json.dumps(llava_small.PROCESSORS["clip"]))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return LlavaModel.load(folder)


PICTURES = llava_small.pictures()[1:3]
PROMPT = f"What is in {IMAGE}, and what in {IMAGE}?"


def test_the_prompt_has_the_tokens_of_each_picture(model):
    ids = model.prompt_ids(f"a{IMAGE}b{IMAGE}", 2)
    assert ids[0] == 1 and ids.count(IMAGE_ID) == 18 and len(ids) == 1 + 2 + 18
    assert ids[2:11] == [IMAGE_ID] * 9 and ids[11] != IMAGE_ID


def tokens_of(model, pictures, text, **options):
    ids = model.prompt_ids(text, len(pictures))
    return ids, model._generate(ids, [model.prepare(x) for x in pictures], NEW, Sampling(temperature=0), **options)


def test_each_token_is_the_likeliest_after_those_before_it(model):
    prompt, tokens = tokens_of(model, PICTURES, PROMPT)
    assert len(tokens) == NEW
    ids = np.asarray([prompt + tokens], np.int32)
    pixels = np.stack([model.prepare(x) for x in PICTURES])[None]

    @jax.jit
    def run(ids, index, pixels):
        reach = Reach.causal(*ids.shape)
        return model.model.language.text_logits(model.model.hidden(ids, pixels, index, reach.behind, reach))

    likeliest = np.asarray(run(ids, feature_index(ids, IMAGE_ID), pixels))[0].argmax(-1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == tokens
    assert tokens_of(model, PICTURES[::-1], PROMPT)[1] != tokens  # which picture is where matters


@pytest.mark.parametrize(
    "shape, layout",
    [((2, 1, 1, 2), "striped"), pytest.param((1, 1, 2, 4), "contiguous", marks=pytest.mark.slow)],
)
def test_answers_do_not_depend_on_the_mesh(folder, model, shape, layout):
    cut = LlavaModel.load(folder, parallel=Parallel(cases.mesh(*shape), layout))
    assert tokens_of(cut, PICTURES, PROMPT) == tokens_of(model, PICTURES, PROMPT)


@pytest.mark.slow
def test_layers_apart_say_the_same(folder, model):
    """As on GPUs."""
    apart = LlavaModel.load(folder)
    apart.model.language = unstacked(apart.model.language)
    assert tokens_of(apart, PICTURES, PROMPT) == tokens_of(model, PICTURES, PROMPT)


def test_an_answer_is_text(model, tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    first = model.answer([tmp_path / "a.png"], "What is it?", max_new_tokens=NEW)
    same = model.complete([PICTURES[0]], f"USER: {IMAGE}\nWhat is it? ASSISTANT:", max_new_tokens=NEW)
    assert isinstance(first, str) and same == first


@pytest.mark.slow
def test_chance_and_no_picture(model):
    said = {model.answer([], "And?", max_new_tokens=8, sampling=Sampling(seed=seed)) for seed in (1, 2, 1)}
    assert len(said) == 2
    assert len(model._generate(model.prompt_ids("?" * 120, 0), [], 20, Sampling(temperature=0))) <= 20
    assert model.answer([], "?" * 100) == model.answer([], "?" * 100, max_new_tokens=10)


def test_an_answer_ends_with_the_end_token(model):
    _, tokens = tokens_of(model, PICTURES, PROMPT)
    stopping = LlavaModel(model.model, model.prepare, model.vocabulary, (tokens[2],), model.context)
    assert tokens_of(stopping, PICTURES, PROMPT)[1] == tokens[: tokens.index(tokens[2])]


def test_transparent_pictures_lie_on_white():
    picture = Image.new("RGBA", (2, 3), (255, 0, 0, 0))
    assert (read_picture(picture) == 255).all() and read_picture(picture).shape == (3, 2, 3)


def test_what_cannot_be_answered(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    picture = PICTURES[0]
    for images, prompt, options, message in (
        ([tmp_path / "a.png"], "?", {}, "a.png is none of PNG, JPEG"),
        ([tmp_path / "b.png"], "?", {}, "b.png does not exist"),
        ([7], "?", {}, "image 0 is a int; give a path, a PIL image or uint8"),
        ([np.zeros((3, 3))], "?", {}, r"the picture is float64\[3, 3\]; give uint8 \[H, W, 3\]"),
        ([picture], f"{IMAGE} and {IMAGE}", {}, "the prompt has 2 <image> for 1 pictures; give one for each"),
        ([], IMAGE, {}, "the prompt has 1 <image> for 0 pictures"),
        ([picture], "<|im_end|>", {}, "the message holds '<|im_end|>'"),
        ([picture], "?", {"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ([picture] * 13, "?", {}, "9 of them a picture, which leave no room in the context of 128"),
        ([picture], "?", {"sampling": Sampling(guidance=2.0)}, "guidance 2.0 is not for answers"),
    ):
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            model.answer(images, prompt, **options)


def test_a_tokenizer_of_another_model(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    with pytest.raises(ValueError, match=r"<image> is ids \[.*\] in the tokenizer and \[259\] in config.json"):
        LlavaModel.load(tmp_path)


def test_the_command_line_asks_it(folder, model, tmp_path, capsys):
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, picture in zip(files, PICTURES):
        Image.fromarray(read_picture(picture)).save(file)
    asked = ["generate", str(folder), "--prompt", PROMPT, *(word for file in files for word in ("--image", str(file)))]
    assert cli.main([*asked, "--max_new_tokens", str(NEW)]) == 0
    assert capsys.readouterr().out == model.answer(files, PROMPT, max_new_tokens=NEW) + "\n"
    clip = tmp_path / "clip.webp"
    write_frames(clip, np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), np.uint8), fps=4)
    for more, message in (
        (["--image", str(clip)], "clip.webp is a clip, and"),
        (["--repetition_penalty", "2"], "--repetition_penalty 2.0: "),
        (["--stop_tokens", "<s>"], "--stop_tokens: "),
    ):
        assert cli.main([*asked, *more]) == 2
        assert message in capsys.readouterr().err
