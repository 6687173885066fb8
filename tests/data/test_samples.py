"""The shipped samples are whole, split as documented, and small enough."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from ringjax.data import samples

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(samples.path("prose_tokenizer.json")))


def test_files_are_as_recorded():
    assert samples.damaged() == []
    for name, entry in samples.manifest().items():
        assert (samples.FOLDER / name).stat().st_size == entry["bytes"]


def test_every_file_is_recorded():
    files = {file.relative_to(samples.FOLDER) for file in samples.FOLDER.rglob("*") if file.is_file()}
    found = {file.as_posix() for file in files if file.parts[0] not in ("licenses", "__pycache__")}
    assert found - {"__init__.py", "README.md", "manifest.json"} == set(samples.manifest())


def test_package_stays_small():
    sizes = {file: file.stat().st_size for file in samples.FOLDER.rglob("*") if file.is_file()}
    model, adapter = (
        sum(size for file, size in sizes.items() if name in file.parts) for name in ("any_to_any", "smollm2_128k")
    )
    assert model <= 20e6 and adapter <= 10e6
    assert sum(sizes.values()) - model - adapter <= 5e6


def test_each_sample_from_elsewhere_has_a_notice():
    notices = "\n".join(file.read_text() for file in (samples.FOLDER / "licenses").iterdir())
    for name in samples.manifest():
        assert name in notices, f"{name} is named by no file in licenses/"
    assert "Redistribution and use" in notices and "MNIST" in notices and "public domain" in notices


def test_damage_is_noticed(tmp_path, monkeypatch):
    whole = samples.path("prose_tokenizer.json").read_bytes()
    (tmp_path / "prose_tokenizer.json").write_bytes(whole[:-1])
    entries = {name: samples.manifest()[name] for name in ("prose_tokenizer.json", "digits.npz")}
    monkeypatch.setattr(samples, "FOLDER", tmp_path)
    monkeypatch.setattr(samples, "manifest", lambda: entries)
    assert samples.damaged() == ["prose_tokenizer.json", "digits.npz"]
    with pytest.raises(FileNotFoundError, match="digits.npz is missing; reinstall"):
        samples.digits()


def test_digits_are_split_and_balanced():
    train, heldout = samples.digits("train"), samples.digits("heldout")
    assert train.images.shape == (4500, 28, 28) and heldout.images.shape == (500, 28, 28)
    assert train.images.dtype == heldout.images.dtype == np.uint8
    for split in (train, heldout):
        np.testing.assert_array_equal(split.labels, np.arange(len(split.labels)) % 10)
        assert split.images.min() == 0 and split.images.max() == 255
    together = np.concatenate([train.images, heldout.images]).reshape(5000, -1)
    assert len(np.unique(together, axis=0)) == 5000


def test_every_tenth_of_a_digit_is_held_out():
    with np.load(samples.path("digits.npz")) as file:
        sevens = file["images"][file["labels"] == 7]
    heldout = samples.digits("heldout")
    np.testing.assert_array_equal(heldout.images[heldout.labels == 7], sevens[9::10])
    train = samples.digits("train")
    np.testing.assert_array_equal(train.images[train.labels == 7][:10], sevens[[0, 1, 2, 3, 4, 5, 6, 7, 8, 10]])


def test_captions():
    assert [samples.digit_caption(label) for label in range(10)] == list(samples.DIGIT_WORDS)
    assert samples.digit_caption(np.uint8(7)) == "seven"
    for label in (-1, 10):
        with pytest.raises(ValueError, match=f"label {label} is not a digit"):
            samples.digit_caption(label)


def test_prose_documents():
    train, heldout = samples.prose("train"), samples.prose("heldout")
    assert [text.splitlines()[0] for text in train] == ["Pride and Prejudice", "Sense and Sensibility", "Emma"]
    assert [text.splitlines()[0] for text in heldout] == ["Northanger Abbey"]
    assert all(len(text) > 400_000 for text in train + heldout)


def test_prose_chapters():
    chapters = samples.prose_chapters("train")
    assert len(chapters) == 61 + 50 + 55
    assert all(chapter.startswith("CHAPTER ") for chapter in chapters)
    assert not any("\nVOLUME" in chapter for chapter in chapters)
    assert sum(map(len, chapters)) > 0.999 * sum(map(len, samples.prose("train")))


@pytest.mark.parametrize("read", [samples.digits, samples.prose, samples.prose_chapters])
def test_unknown_split(read):
    with pytest.raises(ValueError, match="split 'test' is unknown; use 'train' or 'heldout'"):
        read("test")


def test_unknown_file():
    with pytest.raises(ValueError, match="no sample file '../secret'; there are .*digits.npz"):
        samples.path("../secret")


def test_tokenizer_ids(tokenizer):
    assert tokenizer.get_vocab_size() == 512
    specials = ["<pad>", "<s>", "</s>", "<vision>", "</vision>"]
    assert [tokenizer.token_to_id(token) for token in specials] == [0, 1, 2, 3, 4]
    for word in samples.DIGIT_WORDS:
        assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(f" {word}").ids) == 1


def test_tokenizer_knows_every_byte(tokenizer):
    text = samples.prose("heldout")[0][:20_000] + "żółw 🐢 \x00\t\r\n 漢字"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_script_makes_the_shipped_file(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("train_prose_tokenizer", SCRIPTS / "train_prose_tokenizer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shipped = json.loads(samples.path("prose_tokenizer.json").read_text())
    learned = json.loads(script.learn(512).to_str())
    assert learned["model"]["merges"] == shipped["model"]["merges"]
    assert learned["model"]["vocab"] == shipped["model"]["vocab"]
