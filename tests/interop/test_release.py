"""A released any-to-any model: whole in a folder, the same as the run, damaged files refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from ringjax import cli
from ringjax.data import samples
from ringjax.inference.sampling import Sampling
from ringjax.inference.trained import TrainedRun
from ringjax.interop.command import ConvertConfig, run_convert
from ringjax.interop.release import ABOUT, SAMPLE, WEIGHTS, is_release, load_release
from ringjax.models.vqgan import VQGAN, load_vqgan, save_vqgan, vqgan_fingerprint
from tests.data.test_tokenize_captions import VQ, pictures  # noqa: F401 (a fixture)
from tests.tiny_run import tiny_run
from tests.training.test_codes import place  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def folder(place) -> Path:  # noqa: F811
    target = place / "released"
    said = run_convert(ConvertConfig(str(place / "run"), str(target), dtype="float32"))
    assert "text and pictures with their tokenizers" in said
    return target


def test_it_draws_and_sees_as_the_run_does(folder, place):  # noqa: F811
    run, released = TrainedRun.load(place / "run"), TrainedRun.load(folder)
    drawn = [model.draw(["noise"], sampling=Sampling(seed=3, guidance=2.0)) for model in (run, released)]
    assert np.array_equal(*drawn)
    shown = [model.to_pictures(drawn[0]) for model in (run, released)]
    assert np.array_equal(*shown)
    assert run.describe(drawn[0]) == released.describe(drawn[0])
    assert released.codes_of == run.codes_of and released.data.bidirectional_frames
    assert load_release(folder).context == 64
    other = TrainedRun.load(folder, image_tokenizer=str(place / "two.safetensors"))
    with pytest.raises(ValueError, match="is not the one that made the codes"):
        _ = other.vqgan


def test_the_command_line_takes_it(folder, tmp_path, capsys):
    picture = tmp_path / "a.png"
    assert cli.main(["generate", str(folder), "--prompt", "noise", "--draw", str(picture)]) == 0
    assert "16 × 16 pixels" in capsys.readouterr().out
    assert cli.main(["generate", str(folder), "--image", str(picture), "--max_new_tokens", "2"]) == 0


def test_bfloat16_halves_it(place):  # noqa: F811
    target = place / "half"
    run_convert(ConvertConfig(str(place / "run"), str(target)))
    sizes = [(place / name / WEIGHTS).stat().st_size for name in ("released", "half")]
    assert sizes[1] < 0.75 * sizes[0]
    assert TrainedRun.load(target).draw(["noise"], sampling=Sampling()).shape == (1, 16)


def test_damaged_files_are_refused(folder, tmp_path):
    whole = json.loads((folder / ABOUT).read_text())
    for change, fault in (
        ({"format": "other"}, "has format 'other'"),
        ({"model": {**whole["model"], "widht": 3}}, "unknown key 'widht'"),
        ({"model": {**whole["model"], "ffn_width": 32}}, "does not fit ringjax.json"),
        ({"context": "long"}, "context must be a whole number"),
        ({"data": {"codes_per_frame": "x"}}, "codes_per_frame"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        (broken / ABOUT).write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match=fault):
            load_release(broken)
        shutil.rmtree(broken)
    shutil.copytree(folder, broken)
    (broken / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_release(broken)
    (broken / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="is missing; copy the folder again"):
        load_release(broken)


def test_a_run_that_does_not_name_its_image_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not name its image tokenizer"):
        run_convert(ConvertConfig(str(tiny_run()), str(tmp_path / "x")))
    with pytest.raises(ValueError, match="shard_gib 1.0 says nothing"):
        run_convert(ConvertConfig(str(tiny_run()), str(tmp_path / "x"), shard_gib=1.0))
    assert not list(tmp_path.iterdir())


def test_the_packages_own_is_found_by_name():
    assert is_release(SAMPLE)
    if (samples.FOLDER / "any_to_any" / ABOUT).is_file():
        run = TrainedRun.load(SAMPLE)
        assert vqgan_fingerprint(run.vqgan) == run.codes_of
        size = sum(file.stat().st_size for file in (samples.FOLDER / "any_to_any").rglob("*"))
        assert size <= 20e6
    else:
        with pytest.raises(FileNotFoundError, match="sample:any-to-any does not come with this version"):
            load_release(SAMPLE)


def test_an_image_tokenizer_in_half_the_bytes_is_another_one(tmp_path):
    model = VQGAN(VQ, nnx.Rngs(0))
    save_vqgan(model, tmp_path / "whole.safetensors")
    said = run_convert(ConvertConfig(str(tmp_path / "whole.safetensors"), str(tmp_path / "half.safetensors")))
    assert said.endswith("an image tokenizer, bfloat16")
    half = load_vqgan(tmp_path / "half.safetensors")
    assert vqgan_fingerprint(half) != vqgan_fingerprint(model)
    for a, b in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, half))):
        np.testing.assert_allclose(a[1].get_value(), b[1].get_value(), rtol=4e-3, atol=1e-6)
