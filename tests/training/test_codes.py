"""A run keeps to the image tokenizer of its data: when it goes on, begins from another run, draws and sees."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from ringjax.attention import Reach
from ringjax.data.example import see_whole_frames
from ringjax.data.fields import FieldEncoder
from ringjax.data.packing import assemble, cut
from ringjax.data.tokenizers import ByteTokenizer
from ringjax.inference.prefill import prefill
from ringjax.inference.prompts import batch_prompts
from ringjax.inference.run_prompts import RunPrompts
from ringjax.inference.sampling import Sampling
from ringjax.inference.trained import TrainedRun
from ringjax.models.parallel import Parallel
from ringjax.models.vqgan import VQGAN, load_vqgan, save_vqgan, vqgan_fingerprint
from ringjax.training.checkpoint import read_notes
from ringjax.training.load import parse_config
from ringjax.training.loop import train
from ringjax.training.run_folder import CODES_OF, VISION_TOKENIZER
from ringjax.training.yaml_tree import ConfigError
from tests.data.test_tokenize_captions import VQ, pictures, tokenize  # noqa: F401 (a fixture)

CONFIG = """
model: {width: 16, ffn_width: 16, layers: 2, heads: 2, vocab_size: 259, vision_codes: 32, vision_vocab_size: 34,
        dtype: float32}
data: {sources: [{path: SET}], tokenizer: bytes, codes_per_frame: 16, vision_codes: 32, prefetch: 0,
       bidirectional_frames: true, drop_captions: 0.1}
training: {steps: 1, seq_len: 64, batch_size: 2}
mesh: {shape: "2,1,1,4"}
logging: {progress: none, plot: false}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, pictures) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("run")
    save_vqgan(VQGAN(VQ, nnx.Rngs(0)), folder / "one.safetensors")
    save_vqgan(VQGAN(VQ, nnx.Rngs(1)), folder / "two.safetensors")
    for name in ("one", "two"):
        tokenize(
            str(pictures / "captions.jsonl"), folder / f"set_{name}", vision_codes=None,
            fields=("[vision],caption", "[caption],vision"), vision_tokenizer=str(folder / f"{name}.safetensors"),
        )  # fmt: skip
    train(config(folder, "one", "run", ("data.vision_tokenizer", str(folder / "one.safetensors"))))
    return folder


def config(folder: Path, which: str, run: str, *overrides):
    overrides = [("run_dir", str(folder / run)), *overrides]
    return parse_config(CONFIG.replace("SET", str(folder / f"set_{which}")), overrides=overrides)


def test_checkpoints_say_whose_codes_they_know(place):
    made = vqgan_fingerprint(load_vqgan(place / "one.safetensors"))
    assert read_notes(place / "run")[CODES_OF] == made == TrainedRun.load(place / "run").codes_of


def test_a_run_does_not_go_on_or_begin_with_other_codes(place):
    shutil.copytree(place / "run", place / "again")
    with pytest.raises(ValueError, match="the data has codes of image tokenizer .* and .*step_00000001 of"):
        train(config(place, "two", "again", ("training.steps", "2")))
    with pytest.raises(ValueError, match="the data has codes of image tokenizer .* and init_from .*run of"):
        train(config(place, "two", "from", ("init_from", str(place / "run"))))
    train(config(place, "one", "from", ("init_from", str(place / "run"))))


def test_stages_with_two_tokenizers_are_refused_before_anything_runs(place):
    text = CONFIG.replace("SET", str(place / "set_one")) + (
        f"stages: [{{name: a}}, {{name: b, data: {{sources: [{{path: {place / 'set_two'}}}]}}}}]\n"
    )
    with pytest.raises(ConfigError, match="stage 'b': the data has codes .* and a stage before it of"):
        train(parse_config(text, overrides=[("run_dir", str(place / "stages"))]))
    assert not (place / "stages").exists()


def test_a_run_draws_with_the_tokenizer_it_was_trained_with(place):
    run = TrainedRun.load(place / "run")
    assert run.data.vision_tokenizer == str(place / "run" / VISION_TOKENIZER), "the folder is enough"
    assert vqgan_fingerprint(run.vqgan) == run.codes_of
    other = TrainedRun.load(place / "run", image_tokenizer=str(place / "two.safetensors"))
    with pytest.raises(ValueError, match="two.safetensors.* is not the one that made the codes of the run's data"):
        other.draw(["a"], sampling=Sampling())


def test_a_prompts_pictures_are_read_as_the_run_was_trained(place):
    clip = np.arange(32, dtype=np.int32).reshape(2, 16)
    for form in ("own", "lwm"):
        prompt = TrainedRun.load(place / "run", prompt_form=form).prompts.see([clip], "what?")
        start = int(prompt.modality.argmax())
        wanted = [*range(16, -1, -1), *range(16, -1, -1)]  # to the end mark of the own frame, no further
        assert prompt.ahead[start : start + 34].tolist() == wanted
        assert prompt.ahead.sum() == sum(wanted), "text sees nothing ahead"
    assert ByteTokenizer().decode(prompt.tokens[-10:].tolist()) == "ASSISTANT:"


def test_the_prefill_sees_what_a_row_of_training_sees(place):
    """The prompt of a clip, and the same clip in a packed row: the same hidden state where the caption begins."""
    run = TrainedRun.load(place / "run")
    row = {"clip": np.arange(32, dtype=np.int32), "caption": "so"}
    for bidirectional in (True, False):
        data = dataclasses.replace(run.data, bidirectional_frames=bidirectional)
        trained = FieldEncoder(run.tokenizer, codes_per_frame=16, vision_codes=32).encode(row, "[clip],caption")
        trained = see_whole_frames(trained, 32) if bidirectional else trained
        pieces = [p for example in (trained, trained) for p in cut(example, 128, vision_codes=32)]
        batch = assemble([pieces], 1, 128)
        reach = Reach(batch["behind"], batch["ahead"])
        hidden = run.model.hidden(*(batch[name] for name in ("tokens", "modality", "positions")), reach)
        prompt = RunPrompts(run.tokenizer, data).see([row["clip"].reshape(2, 16)], "")
        for start in (0, len(pieces[0])):
            wanted = hidden[0, start + len(prompt) - 1]
            found = prefill(run.model, batch_prompts([prompt], 1, Parallel())[0], 80, Parallel())[0][0]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        seen = found if bidirectional else seen
    assert not np.allclose(seen, found, rtol=1e-3), "the reach makes a difference"
