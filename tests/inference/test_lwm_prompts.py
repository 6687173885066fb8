"""LWM's prompts, id for id, and drawing a clip as LWM does."""

import dataclasses

import numpy as np
import pytest

from ringjax.data.tokenizers import ByteTokenizer
from ringjax.inference import trained
from ringjax.inference.generate_config import GenerateConfig
from ringjax.inference.lwm_prompts import CLIP, LwmPrompts
from ringjax.inference.sampling import Sampling
from ringjax.inference.trained import TrainedRun
from tests.tiny_run import tiny_run

ASKED = "You are a helpful assistant. USER: "
CODES = np.arange(8).reshape(2, 4)
PROMPTS = LwmPrompts(ByteTokenizer(), codes_per_frame=4)


def read(prompt) -> str:
    """Text as it is, vision ids in brackets; every text begins with `<s>`, once."""
    assert prompt.tokens[0] == 1 and 1 not in prompt.tokens[1:][~prompt.modality[1:]]
    parts = zip(prompt.tokens[1:].tolist(), prompt.modality[1:].tolist())
    return "".join(f"[{token}]" if vision else chr(token - 3) for token, vision in parts)


def test_the_forms():
    assert read(PROMPTS.text("Why?")) == f"{ASKED}Why? ASSISTANT:"
    assert read(PROMPTS.picture("a cat")) == f"{ASKED}Generate an image of a cat ASSISTANT:<vision>"
    assert read(PROMPTS.wordless()) == "<vision>"
    assert read(PROMPTS.clip("a cat", CODES[1])) == (
        f"{ASKED}Generate a video of a cat ASSISTANT:<vision>[4][5][6][7][8192]"
    )
    assert read(PROMPTS.see([CODES[:1]], "What?")) == (
        f"{ASKED}What?\n<vision>[0][1][2][3][8193]</vision> ASSISTANT:"
    )  # fmt: skip
    assert read(PROMPTS.see([CODES, CODES[1:]], "What?")) == (
        f"{ASKED}What?\n<vision>[0][1][2][3][8192][4][5][6][7][8193]</vision>"
        "<vision>[4][5][6][7][8193]</vision> ASSISTANT:"
    )
    assert read(PROMPTS.needle("Long text.", "What is it?")) == (
        f"{ASKED}Long text. What is it? Don't give information outside the document or repeat your findings."
        " Keep your response short and direct. ASSISTANT: "
    )


def test_vision_opens_with_the_ids_it_has_within_the_sentence(tmp_path):
    """LLaMA's pieces begin with a space; encoded alone, `<vision>` has the ids that it has behind `ASSISTANT: `."""
    spm = pytest.importorskip("sentencepiece")
    words = [f"{PROMPTS_TEXT} <vision> {number}" for number in range(300)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "small"), vocab_size=90, model_type="bpe",
        byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    from ringjax.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(tmp_path / "small.model"))
    assert dict(tokenizer.specials) == {"<s>": 1, "</s>": 2}
    text = f"{ASKED}Generate an image of a cat ASSISTANT: <vision>"
    assert LwmPrompts(tokenizer).picture("a cat").tokens.tolist() == [1, *tokenizer.encode(text)]


PROMPTS_TEXT = f"{ASKED}Generate an image of a cat ASSISTANT:"


def test_settings_are_those_of_lwm():
    def settings(**options):
        return GenerateConfig("run", prompt_form="lwm", **options)

    drawn = settings(prompt="a cat", draw="a.webp", frames=4, seed=3)
    assert drawn.sampling() == Sampling(1.0, top_k=8192, guidance=5.0, seed=3)
    assert drawn.later_sampling() == Sampling(1.0, top_k=1000, guidance=1.0, seed=3)
    assert settings(image=("a.png",)).sampling() == Sampling(0.2)
    assert settings(prompt="Why?", temperature=0.0).sampling() == Sampling(0.0)
    mine = settings(prompt="a cat", draw="a.webp", frames=4, guidance=3.0, top_k=5)
    assert (mine.sampling().guidance, mine.later_sampling().guidance, mine.later_sampling().top_k) == (3.0, 1.0, 5)
    both = settings(prompt="a cat", interleaved=True)
    assert both.sampling() == Sampling(0.2) and both.vision_sampling() == Sampling(1.0, top_k=1000)


def test_a_clip_begins_with_a_picture(monkeypatch):
    """Guided; the frames after it follow in the form for clips and are not."""
    run = dataclasses.replace(TrainedRun.load(tiny_run()), prompt_form="lwm")
    calls = []
    real = trained.generate_frames

    def spy(model, prompts, **options):
        calls.append((prompts, options))
        return real(model, prompts, **options)

    monkeypatch.setattr(trained, "generate_frames", spy)
    guided = Sampling(1.0, top_k=8192, guidance=5.0, seed=4)
    codes = run.draw_clips(["one", "two"], 3, sampling=guided)
    assert codes.shape == (2, 3, 16)
    (first, one), (later, two) = calls
    assert [one["frames"], two["frames"]] == [1, 2]
    assert one["sampling"] == guided and two["sampling"] == dataclasses.replace(CLIP, seed=4)
    assert first[0].tokens.tolist() == run.prompts.picture("one").tokens.tolist()
    assert later[1].tokens.tolist()[-17:] == [*codes[1, 0], 64] and later[1].modality[-17:].all()
    np.testing.assert_array_equal(run.draw(["one", "two"], sampling=guided), codes[:, 0])
    assert len(calls) == 3
