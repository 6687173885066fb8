"""Likelihoods of answers: those of the plain formula, whatever the mesh, the frames' sight or the window."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.attention import Reach
from ringjax.data.config import DataConfig
from ringjax.data.example import see_whole_frames
from ringjax.data.fields import FieldEncoder
from ringjax.data.tokenizers import load_tokenizer
from ringjax.evaluation.choices import Judge
from ringjax.evaluation.likelihood import Likelihood
from ringjax.inference.prompts import text_prompt
from ringjax.inference.run_prompts import RunPrompts
from ringjax.inference.trained import TrainedRun
from ringjax.models.transformer import with_config
from tests.inference.small import parallel, small_model

DATA = DataConfig(tokenizer="bytes", codes_per_frame=4, vision_codes=20)
CLIP = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
CAPTIONS = ("a cat", "b", "two red dice and a long story")


def model(**changes):
    return small_model(vocab_size=260, **changes)


def prompt(whole_frames=False):
    data = dataclasses.replace(DATA, bidirectional_frames=whole_frames)
    return RunPrompts(load_tokenizer("bytes"), data).see([CLIP], "")


def answers():
    tokenizer = load_tokenizer("bytes")
    return [[*tokenizer.encode(caption), tokenizer.eos_id] for caption in CAPTIONS]


def plain(model, prompt, answer):
    """Σ log softmax at the answer's tokens, from all logits of the whole sequence, sight given as a reach."""
    tokens = np.concatenate([prompt.tokens, answer])[None].astype(np.int32)
    modality = np.concatenate([prompt.modality, np.zeros(len(answer), bool)])[None]
    ahead = np.zeros(tokens.shape, np.int32)
    if prompt.ahead is not None:
        ahead[0, : len(prompt)] = prompt.ahead
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]

    @jax.jit
    def logits(tokens, modality, ahead):
        return model.text_logits(model.hidden(tokens, modality, jnp.asarray(places), Reach(places, ahead)))[0]

    logs = jax.nn.log_softmax(logits(tokens, modality, ahead), axis=-1)
    return float(sum(logs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


@pytest.mark.parametrize("whole_frames", [False, True])
def test_the_plain_formula(whole_frames):
    seen = prompt(whole_frames)
    found = Likelihood(model())(seen, answers())
    np.testing.assert_allclose(found, [plain(model(), seen, answer) for answer in answers()], rtol=1e-5)
    assert len(set(found)) == len(CAPTIONS)


def test_whole_frames_are_another_sight():
    assert not np.allclose(Likelihood(model())(prompt(True), answers()), Likelihood(model())(prompt(), answers()))


def test_a_prompt_of_one_token_and_a_window():
    begin = text_prompt([1])
    found = Likelihood(model())(begin, answers())
    np.testing.assert_allclose(found, [plain(model(), begin, answer) for answer in answers()], rtol=1e-5)
    narrow = with_config(model(), window=6)
    found = Likelihood(narrow)(prompt(), answers())
    np.testing.assert_allclose(found, [plain(narrow, prompt(), answer) for answer in answers()], rtol=1e-5)
    assert not np.allclose(found, Likelihood(model())(prompt(), answers()))


@pytest.mark.parametrize(
    "shape, layout, whole_frames",
    [((1, 2, 2, 2), "zigzag", True), pytest.param((2, 1, 1, 4), "striped", False, marks=pytest.mark.slow)],
)
def test_any_mesh(shape, layout, whole_frames):
    seen = prompt(whole_frames)
    alone = Likelihood(model())(seen, answers())
    np.testing.assert_allclose(Likelihood(model(), parallel(shape, layout))(seen, answers()), alone, rtol=1e-5)


def test_an_answer_of_nothing_is_refused():
    with pytest.raises(ValueError, match="answer 1 has no tokens"):
        Likelihood(model())(prompt(), [[5], []])


@pytest.mark.parametrize("add_eos", [True, False])
def test_what_is_scored_is_what_is_learned(add_eos):
    """The prompt and the caption after it are, token for token, the example of training."""
    data = dataclasses.replace(DATA, add_eos=add_eos)
    run = TrainedRun(model(), data)
    encoder = FieldEncoder(run.tokenizer, codes_per_frame=4, vision_codes=20, add_eos=add_eos)
    learned = encoder.encode({"vision": CLIP.ravel(), "caption": "a cat"}, "[vision],caption")
    tokens = [*run.prompts.see([CLIP], "").tokens, *Judge(run).answer("a cat")]
    assert tokens == learned.tokens.tolist() and learned.loss.sum() == len(Judge(run).answer("a cat"))
    asked = encoder.encode({"vision": CLIP.ravel(), "words": "What?", "caption": "b"}, "[vision],[words],caption")
    assert [*run.prompts.see([CLIP], "What?").tokens, *Judge(run).answer("b")] == asked.tokens.tolist()


def plain_codes(model, words, clip=CLIP):
    """Σ log softmax at the codes and their end marks, each after all before it, from all logits of both tables."""
    codes = np.concatenate([clip, [[20], [20], [21]]], axis=1).ravel()
    tokenizer = load_tokenizer("bytes")
    before = [tokenizer.bos_id, *tokenizer.encode(words), *tokenizer.marker("<vision>")]
    tokens = jnp.asarray([[*before, *codes]], jnp.int32)
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden = jax.jit(lambda tokens: model.hidden(tokens, places >= len(before), places))(tokens)
    logs = jax.nn.log_softmax(model.vision_logits(hidden)[0], axis=-1)
    return float(sum(logs[len(before) - 1 + i, code] for i, code in enumerate(codes)))


def test_codes_are_the_likelihood_of_the_picture_after_the_caption():
    found = Judge(TrainedRun(model(), DATA)).of_codes(CLIP, CAPTIONS)
    np.testing.assert_allclose(found, [plain_codes(model(), caption) for caption in CAPTIONS], rtol=1e-5)
    narrow = with_config(model(), window=6)
    found = Judge(TrainedRun(narrow, DATA)).of_codes(CLIP, CAPTIONS)
    np.testing.assert_allclose(found, [plain_codes(narrow, caption) for caption in CAPTIONS], rtol=1e-5)


@pytest.mark.parametrize("shape, layout", [((1, 2, 2, 2), "zigzag"), ((2, 1, 1, 4), "striped")])
def test_codes_on_any_mesh(shape, layout):
    alone = Judge(TrainedRun(model(), DATA)).of_codes(CLIP, CAPTIONS)
    found = Judge(TrainedRun(model(), DATA, parallel(shape, layout))).of_codes(CLIP, CAPTIONS)
    np.testing.assert_allclose(found, alone, rtol=1e-5)


@pytest.mark.parametrize("form", ["own", "lwm"])
def test_the_codes_scored_are_the_codes_learned(form):
    run = TrainedRun(model(), DATA, prompt_form=form)
    encoder = FieldEncoder(run.tokenizer, codes_per_frame=4, vision_codes=20)
    words = "You are a helpful assistant. USER: Generate a video of a cat ASSISTANT:" if form == "lwm" else "a cat"
    learned = encoder.encode({"vision": CLIP.ravel(), "words": words}, "[words],vision")
    drawn = run.prompts.drawn("a cat", CLIP)
    assert drawn.tokens.tolist() == learned.tokens[: len(drawn)].tolist()
    assert drawn.loss.tolist() == drawn.modality.tolist()
    if form == "lwm":
        assert run.prompts.drawn("a cat", CLIP[:1]).tokens.tolist()[:-5] == run.prompts.picture("a cat").tokens.tolist()


def test_lift_is_the_likelihood_less_that_without_the_picture():
    run = TrainedRun(model(), see := dataclasses.replace(DATA, bidirectional_frames=True))
    verdict = Judge(run)(CLIP, CAPTIONS)
    seen = see_whole_frames(RunPrompts(run.tokenizer, see).see([CLIP], ""), 20)
    for number, answer in enumerate(answers()):
        here, without = plain(model(), seen, answer), plain(model(), text_prompt([1]), answer)
        np.testing.assert_allclose(verdict.scores("sum")[number], here, rtol=1e-5)
        np.testing.assert_allclose(verdict.scores("mean")[number], here / len(answer), rtol=1e-5)
        np.testing.assert_allclose(verdict.scores("lift")[number], here - without, rtol=1e-4, atol=1e-4)
    assert verdict.picked("sum") == int(np.argmax(verdict.sums))
