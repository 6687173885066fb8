"""Sources that are not jsonl: plain text and the samples."""

import numpy as np
import pytest

from ringjax.data import samples
from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.errors import DataError
from ringjax.data.sources import open_sources
from ringjax.data.tokenizers import load_tokenizer


def opened(path: str, split: str = "train", fields=None, **options):
    config = DataConfig(sources=(SourceConfig(path, fields=fields),), **options)
    return open_sources(config, split)[0][0]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    source = opened(str(tmp_path / "a.txt"), tokenizer="bytes")
    assert len(source) == 1
    tokenizer = load_tokenizer("bytes")
    assert source.read(0).tokens.tolist() == [1, *tokenizer.encode("Once upon a time.\n"), 2]


def test_bad_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        opened(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match="'text' is empty"):
        opened(str(tmp_path / "a.txt")).read(0)
    with pytest.raises(ValueError, match="plain text and has no fields"):
        opened(str(tmp_path / "a.txt"), fields="text")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prose_and_novels(split):
    prose, novels = opened("sample:prose", split), opened("sample:novels", split)
    assert len(prose) == len(samples.prose_chapters(split)) and len(novels) == len(samples.prose(split))
    tokenizer, example = load_tokenizer("sample"), prose.read(3)
    assert tokenizer.decode(example.tokens.tolist()) == samples.prose_chapters(split)[3]
    assert example.tokens[0] == tokenizer.bos_id and example.tokens[-1] == tokenizer.eos_id
    assert example.loss.tolist() == [False] + [True] * (len(example) - 1)
    assert prose.fingerprint != novels.fingerprint


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_digits_are_told_and_drawn(split):
    options = {"codes_per_frame": 16, "vision_codes": 64}
    source, tokenizer = opened("sample:digits", split, **options), load_tokenizer("sample")
    labels = samples.digits(split).labels
    assert len(source) == 2 * len(labels)
    for number in (0, 7, 123):
        word = samples.digit_caption(labels[number])
        told, drawn = source.read(2 * number), source.read(2 * number + 1)
        assert np.array_equal(told.tokens[told.modality], drawn.tokens[drawn.modality])
        assert told.modality.sum() == 17 and told.tokens[told.modality][-1] == 65
        assert tokenizer.decode(told.tokens[told.loss].tolist()) == word
        assert not told.loss[told.modality].any() and drawn.loss[drawn.modality].all()
    words = [tokenizer.decode(source.read(i).tokens[~source.read(i).modality].tolist()) for i in range(1, 400, 2)]
    bare = sum(words[i] == "" for i in range(200))
    assert 8 <= bare <= 35, "about one drawing of ten has no words"
    assert all(word in ("", samples.digit_caption(label)) for word, label in zip(words, labels))


def test_digits_with_other_sizes_are_refused():
    with pytest.raises(ValueError, match="sample:digits has 16 codes a frame of a codebook of 64"):
        opened("sample:digits")


def test_digits_by_own_fields():
    source = opened("sample:digits", fields="[vision],caption", codes_per_frame=16, vision_codes=64)
    assert len(source) == 4500
