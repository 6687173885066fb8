"""A tokenizer's run through the loop: its files, its resumption, its refusals."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from ringjax.data.errors import DataError
from ringjax.data.heldout import side_of
from ringjax.models.vqgan import decode_pictures, encode_pictures, load_vqgan
from ringjax.training import loop
from ringjax.training.checkpoint import CheckpointError, restore_model
from ringjax.training.load import load_config, load_run, parse_run, to_yaml
from ringjax.training.metrics import read_metrics
from ringjax.training.stops import Preempted
from ringjax.training.yaml_tree import ConfigError
from tests.data.picture_folder import drawn, picture_folder, save_clip, write_captions
from tests.training.image_tokenizer.tiny import CONFIG, FSQ, dotted, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 pictures and two clips of five frames, in two folders."""
    folder = tmp_path_factory.mktemp("data")
    pictures = picture_folder(folder / "pictures", 40)
    clips = folder / "clips"
    clips.mkdir()
    for i in range(2):
        save_clip(clips / f"{i}.webp", 5, first=100 + 10 * i)
    rows = [{"file": f"{i}.webp", "caption": caption} for i, caption in enumerate(["cat", "dog"])]
    return pictures, write_captions(clips, rows)


@pytest.fixture
def config(data, tmp_path):
    def make(folder="run", **overrides):
        sources = f"[{{path: {data[0]}, weight: 3}}, {{path: {data[1]}, weight: 1}}]"
        return tiny(**{"run_dir": tmp_path / folder, "data__sources": sources, **overrides})

    return make


def records(folder, key="loss"):
    skip = ("time", "seconds", "data_seconds", "pictures_per_second")
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in skip} for record in found if key in record]


def held_out(data):
    names = [i for i in range(40) if side_of(f"thing {i}", 0.3) == "heldout"]
    small = [drawn(i).resize((16, 16), Image.Resampling.LANCZOS) for i in names]
    return np.stack([np.asarray(picture) for picture in small])


def test_a_run_leaves_its_files_and_goes_on_where_it_was(config, data, tmp_path, monkeypatch):
    whole, half = tmp_path / "whole", tmp_path / "half"
    loop.train(config("whole"))
    write = loop.MetricsWriter.write

    def stopping(self, record):
        write(self, record)
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(loop.MetricsWriter, "write", stopping)
        loop.train(config("half"))
    assert not (half / "tokenizer.safetensors").exists()
    loop.train(config("half"))

    assert [r["step"] for r in records(whole)] == list(range(1, 9))
    assert records(half) == records(whole)  # float for float, the use of codes too
    assert records(half, "eval") == records(whole, "eval")
    assert [r["discriminator_loss"] is None for r in records(whole)] == [True] * 4 + [False] * 4
    assert (half / "tokenizer.safetensors").read_bytes() == (whole / "tokenizer.safetensors").read_bytes()
    assert parse_run((whole / "config.yaml").read_text()) == config("whole")

    # What the written file does to the held-out pictures is what was measured.
    model, pictures = load_vqgan(whole / "tokenizer.safetensors"), held_out(data)
    codes = encode_pictures(model, pictures)
    shown = decode_pictures(model, codes)
    errors = ((shown.astype(np.float64) - pictures) ** 2).mean(axis=(1, 2, 3))
    measured = records(whole, "eval")[-1]["eval"][str(data[0])]
    assert measured["pictures"] == len(pictures)
    assert measured["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=0.02)
    assert measured["usage"] == len(np.unique(codes)) / 16
    sheet = np.asarray(Image.open(whole / "reconstructions.png"))
    np.testing.assert_array_equal(sheet[4:20, 4:20], pictures[0])
    assert np.abs(sheet[24:40, 4:20].astype(int) - shown[0]).max() <= 1


def test_the_display_says_what_counts(config, capsys):
    loop.train(config(logging__progress="plain", training__steps=4, losses__adversarial=0))
    said = capsys.readouterr().out
    assert "no perceptual loss (no weights), no adversarial loss" in said
    assert "pictures and frames to train on: " in said and "pictures/s" in said and "codes used" in said
    assert "held-out" in said and "dB" in said and "SSIM" in said and "fingerprint" in said


def test_finite_scalar_quantization_is_written_and_read(config, tmp_path):
    loop.train(config(training__steps=4, training__eval_every=0, losses__adversarial=0, **dotted(FSQ)))
    model = load_vqgan(tmp_path / "run" / "tokenizer.safetensors")
    assert model.config.levels == (4, 4) and not hasattr(model, "codebook")


def test_a_run_begins_with_the_parameters_of_another(config, tmp_path):
    loop.train(config())
    loop.train(config("next", init_from=tmp_path / "run"))
    assert records(tmp_path / "next")[0]["loss"] < records(tmp_path / "run")[0]["loss"] - 0.05


def test_changed_pictures_are_refused(config, data, tmp_path):
    loop.train(config())
    with pytest.raises(ValueError, match="made with other pictures: data changed"):
        loop.train(config(training__steps=9, data__heldout_share=0.2))
    with pytest.raises(ValueError, match="made with other pictures: seed changed"):
        loop.train(config(training__steps=9, seed=1))
    with pytest.raises(CheckpointError, match=r"float32\[16,4\] there and float32\[32,4\] here"):
        loop.train(config(training__steps=9, vqgan__codes=32))


@pytest.mark.parametrize("keep", ["memory", "stream"])
def test_broken_pictures_are_named_or_stop_the_run(config, tmp_path, capsys, keep):
    path = picture_folder(tmp_path / "some", 20)
    broken = next(i for i in range(20) if side_of(f"thing {i}", 0.3) == "train")
    content = (tmp_path / "some" / f"{broken}.png").read_bytes()
    (tmp_path / "some" / f"{broken}.png").write_bytes(content[: len(content) * 2 // 3])
    with path.open("a") as file:
        file.write(json.dumps({"file": "gone.png", "caption": f"thing {broken}"}) + "\n")
    options = {
        "data__sources": f"[{{path: {path}}}]", "data__keep": keep, "training__steps": 4,
        "losses__adversarial": 0, "logging__progress": "plain",
    }  # fmt: skip
    with pytest.raises((ConfigError, DataError), match="gone.png does not exist.*data.on_error skip"):
        loop.train(config(**options))
    loop.train(config(**options, data__on_error="skip"))
    said = capsys.readouterr().out
    assert "gone.png does not exist" in said and "2 files left out" in said
    left_out = (tmp_path / "run" / "left_out.txt").read_text()
    assert f"{broken}.png" in left_out and "gone.png" in left_out
    assert len(records(tmp_path / "run")) == 4


def test_what_cannot_be_used_is_refused_before_anything_is_written(config, data, tmp_path):
    refusals = [
        ({"data__sources": "[{path: gone.jsonl}]"}, "gone.jsonl does not exist"),
        ({"losses__perceptual_weights": "gone.safetensors"}, "perceptual_weights gone.safetensors does not exist"),
        ({"training__batch_size": 12}, "batch_size 12 pictures cannot be divided over dp 2 · fsdp 4 = 8 devices"),
        ({"mesh__shape": "16,1,1,1"}, "asks for 16 devices"),
        ({"data__memory_gb": 0.001, "vqgan__resolution": 256}, "take 0.0 GB|raise it, or set data.keep to stream"),
        ({"data__heldout_share": 1e-9, "training__eval_every": 1}, "no caption falls into data.heldout_share"),
    ]
    for overrides, message in refusals:
        with pytest.raises(ConfigError, match=message):
            loop.train(config(**overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides, message", [
    ({"stages": "[{name: a}]"}, "unknown key 'stages'"),
    ({"training__seq_len": 8}, "unknown key 'training.seq_len'"),
    ({"model__size": "debug"}, "sections model and vqgan in one config"),
    ({"mesh__shape": "1,1,2,4"}, "not cut over tp and sp; set both to 1"),
    ({"codebook__method": "fsq"}, "codebook.method 'fsq' and vqgan.levels .* disagree"),
    ({"vqgan__levels": "[4, 4]"}, "make 16 codes of 2 dimensions, not codes 16 and code_dim 4"),
    ({"vqgan__channels": 2}, "pictures have 1 or 3"),
    ({"losses__discriminator_layers": 4}, "needs pictures of .* use fewer layers"),
    ({"losses__perceptual_layers": "[conv5_1]"}, "the layers are conv1_1"),
    ({"data__background": "reddish"}, "no colour"),
    ({"data__heldout_share": 0, "training__eval_every": 2}, "needs held-out pictures"),
    ({"data__fit": "centre"}, "use crop or pad"),
])  # fmt: skip
def test_what_is_not_honoured_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**overrides)


def test_where_a_transformer_is_wanted_a_tokenizer_is_refused(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    assert load_run(path) == tiny() and parse_run(to_yaml(tiny())) == tiny()
    with pytest.raises(ConfigError, match="the run of an image tokenizer"):
        load_config(path)
    loop.train(config(training__steps=4, losses__adversarial=0))
    with pytest.raises(CheckpointError, match="an image tokenizer.s run"):
        restore_model(tmp_path / "run")
