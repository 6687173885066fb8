"""Tokenizers give no token that was not asked for."""

import json

import pytest

from ringjax.data import samples
from ringjax.data.tokenizers import ByteTokenizer, JsonTokenizer, TextTokenizer, load_tokenizer, tokenizer_files
from tests.interop.tokenizers_small import tokenizer_json

TEXTS = ["It is a truth universally acknowledged,", " spaces ", "naïve 字 🙂", "<s> not </s> special <pad>"]


@pytest.fixture(scope="module", params=["bytes", "sample", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    if request.param != "sentencepiece":
        return load_tokenizer(request.param)
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    (folder / "text.txt").write_text("\n".join(samples.prose_chapters("heldout")[0].split(". ")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400, byte_fallback=True,
        model_type="bpe", remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_interface(tokenizer):
    assert isinstance(tokenizer, TextTokenizer)
    assert len({tokenizer.bos_id, tokenizer.eos_id}) == 2
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id]) == "a b"
    assert tokenizer.fingerprint


def test_markers_are_one_id_where_there_is_one():
    assert load_tokenizer("sample").marker("<vision>") == [3]
    assert load_tokenizer("sample").encode("<vision>") != [3]
    assert ByteTokenizer().marker("<vision>") == ByteTokenizer().encode("<vision>")


def test_a_missing_padding_token_is_no_fault(tmp_path):
    content = json.loads(samples.path("prose_tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<pad>"]
    del content["model"]["vocab"]["<pad>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_id == tokenizer.eos_id == 2


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    content = samples.path("prose_tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content.replace(b'"version": "1.0"', b'"version":  "1.0"'))
    prints = {load_tokenizer(name).fingerprint for name in ("bytes", "sample")}
    assert len(prints) == 2
    assert load_tokenizer(str(samples.path("prose_tokenizer.json"))).fingerprint in prints


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist; give 'sample'"):
        load_tokenizer("nowhere")
    with pytest.raises(ValueError, match="no known kind"):
        load_tokenizer(str(tmp_path))
    cut = tmp_path / "tokenizer.json"
    cut.write_bytes(samples.path("prose_tokenizer.json").read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole tokenizer.json"):
        JsonTokenizer(cut)
    bad = tmp_path / "tokenizer.model"
    bad.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a whole SentencePiece model"):
        load_tokenizer(str(bad))
    content = json.loads(samples.path("prose_tokenizer.json").read_text().replace('"</s>"', '"(end)"'))
    (tmp_path / "noend.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no end token"):
        load_tokenizer(str(tmp_path / "noend.json"))


def _with_settings(folder, **settings):
    (folder / "tokenizer.json").write_bytes(samples.path("prose_tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(folder))


def test_settings_beside_a_tokenizer_say_how_examples_begin_and_end(tmp_path):
    plain = load_tokenizer("sample")
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (1, 2, 0)
    names = {"bos_token": "<vision>", "eos_token": {"content": "</vision>"}}
    told = _with_settings(tmp_path, **names, pad_token="</s>", add_bos_token=True)
    assert (told.bos_id, told.eos_id, told.pad_id) == (3, 4, 2)
    assert told.fingerprint != plain.fingerprint  # other examples come of it
    # What the model's own tokenizer doesn't put before a text is no begin token: it begins a turn.
    assert _with_settings(tmp_path, **names).bos_id == 1
    same = _with_settings(tmp_path, eos_token="</s>", pad_token=None)
    assert (same.bos_id, same.eos_id, same.pad_id, same.fingerprint) == (1, 2, 0, plain.fingerprint)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("spec", ["sample", "folder", "file"])
def test_the_files_of_a_tokenizer_make_it_again(tmp_path, spec):
    folder, copy = tmp_path / "given", tmp_path / "copy"
    folder.mkdir(), copy.mkdir()
    _with_settings(folder, eos_token="</vision>")
    spec = {"folder": str(folder), "file": str(folder / "tokenizer.json")}.get(spec, spec)
    for name, content in tokenizer_files(spec).items():
        (copy / name).write_bytes(content)
    a, b = load_tokenizer(spec), load_tokenizer(str(copy))
    assert (a.fingerprint, a.bos_id, a.eos_id, a.pad_id) == (b.fingerprint, b.bos_id, b.eos_id, b.pad_id)
    assert tokenizer_files("bytes") == {}


def test_a_library_that_panics_is_a_fault_of_the_file(tmp_path):
    """tokenizers 0.23: a charsmap that says it is longer than it is ends in a panic, which is no Exception."""
    made = json.loads(tokenizer_json())
    made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="tokenizer.json (is not a whole tokenizer.json|cannot encode this text)"):
        load_tokenizer(str(tmp_path)).encode("abc")


def test_settings_that_are_nested_without_end(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="tokenizer_config.json is not whole JSON: nested"):
        load_tokenizer(str(tmp_path))


def test_bytes_that_are_no_text_in_a_sentencepiece_model(tmp_path):
    """Its fault, told in those bytes, was no text either."""
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x07\x0a\x05<unk>\x0a\x03\x0a\x01\xff\x0a\x03\x0a\x01\xff")
    with pytest.raises(ValueError, match="tokenizer.model is not a whole SentencePiece model"):
        load_tokenizer(str(tmp_path))
