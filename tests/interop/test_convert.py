"""`ringjax convert`: between all forms, exact, and nothing overwritten."""

import json

import chex
import jax
import pytest
from flax import nnx

from ringjax import cli
from ringjax.inference.text_model import TextModel
from ringjax.interop.hf import load_hf, read_description
from ringjax.models import ModelConfig, Transformer
from tests.inference import published
from tests.interop import families
from tests.interop.test_hf import logits
from tests.interop.tokenizers_small import TEMPLATE


def convert(capsys, *arguments) -> str:
    code = cli.main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (code == 0) == (not captured.err), captured.err
    return captured.out + captured.err


def same(a, b) -> None:
    chex.assert_trees_all_equal(jax.tree.leaves(a), jax.tree.leaves(b))


def test_hugging_face_to_lwm_and_back(tmp_path, capsys):
    first = families.write(tmp_path / "first", {**families.FAMILIES["llama2"], "rope_theta": 5e5, "rms_norm_eps": 1e-6})
    for scanned in ("true", "false"):
        stream, back = tmp_path / f"{scanned}.msgpack", tmp_path / f"back_{scanned}"
        assert "an LWM stream, float32" in convert(
            capsys, first, stream, "--dtype", "float32", "--scanned", scanned
        )
        said = convert(capsys, stream, back, "--dtype", "float32", "--context", "128", "--rope_theta", "5e5",
                       "--heads", "6")  # fmt: skip
        assert "a Hugging Face folder, float32" in said and "1 file(s)" in said
        same(load_hf(back), load_hf(first))
        assert (logits(load_hf(back)) == logits(load_hf(first))).all()


def test_gguf_to_hugging_face_keeps_the_tokenizer(tmp_path, capsys):
    pytest.importorskip("gguf")
    from tests.interop import test_gguf as small

    template = {"tokenizer.chat_template": TEMPLATE}
    file = small.write(tmp_path, small.weights(), kind="Q8_0", general=template)
    convert(capsys, file, tmp_path / "folder", "--dtype", "float32")
    one, other = TextModel.load(file, dtype="float32"), TextModel.load(tmp_path / "folder", dtype="float32")
    same(one.model, other.model)
    turns = [{"role": "user", "content": "Why 12?"}]
    assert one.chat_ids(turns) == other.chat_ids(turns) and one.stop_ids == other.stop_ids
    assert one.context == other.context


def test_the_tokenizer_comes_along(tmp_path, capsys):
    first = published.write(tmp_path / "first")
    convert(capsys, first, tmp_path / "second", "--shard_gib", "1e-5")
    assert len(list((tmp_path / "second").glob("model-*.safetensors"))) > 1
    turns = [{"role": "user", "content": "Hello"}]
    assert TextModel.load(tmp_path / "second").chat_ids(turns) == TextModel.load(first).chat_ids(turns)
    assert read_description(tmp_path / "second").eos_ids == (2,)


@pytest.mark.parametrize("ends", [0, [0, 2], None])
def test_the_tokens_that_end_come_along(tmp_path, capsys, ends):
    first = published.write(tmp_path / "first", eos_token_id=ends)
    convert(capsys, first, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["eos_token_id"] == ends


def test_a_run_becomes_a_folder(tmp_path, capsys):
    from tests.tiny_run import tiny_run

    run = tiny_run()
    assert "does not name its image tokenizer" in convert(capsys, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "a Hugging Face folder, bfloat16" in convert(capsys, run, tmp_path / "out", "--text_only", "true")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    convert(capsys, run, tmp_path / "out.msgpack", "--dtype", "float32")


def test_the_text_part_writes_the_same_text():
    from ringjax.interop.command import text_part

    config = ModelConfig(
        width=24, ffn_width=40, layers=2, heads=6, vocab_size=64, vision_vocab_size=20, vision_codes=16, dtype="float32"
    )
    whole = Transformer.create(config, 0)
    assert (logits(text_part(whole)) == logits(whole)).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["first", "first"], "first is there already; give another name"),
        (["nothing", "out"], "is neither a run folder (config.yaml), a Hugging Face folder"),
        (["first"], "ringjax convert takes SOURCE TARGET, not"),
        (["first", "out", "--dtype", "int8"], "int8"),
        (["first", "out", "--shard_gib", "0"], "shard_gib 0.0 must be above 0"),
        (["first", "out", "--heads", "0"], "heads 0 must be at least 1"),
        (["first", "out", "--heads", "6"], "heads 6 says nothing about first -> out; leave it out"),
        (["first", "out", "--scanned", "false"], "scanned False says nothing about first -> out"),
        (["first", "out.msgpack", "--context", "64"], "context 64 says nothing about first -> out.msgpack"),
        (["first", "out.safetensors", "--dtype", "float32"], "dtype float32 says nothing about"),
        (["tied", "out.msgpack"], "an LWM stream has no tied embeddings"),
    ],
)
def test_wrong_calls(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    families.write(tmp_path / "first", families.FAMILIES["llama2"])
    families.write(tmp_path / "tied", families.FAMILIES["tied"])
    assert message in convert(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "tied"]


def test_a_vqgan_pickle(tmp_path, capsys, monkeypatch):
    from ringjax.interop import pickled
    from ringjax.models import vqgan

    small = vqgan.DIGITS
    model = vqgan.VQGAN(small, nnx.Rngs(0))
    monkeypatch.setattr(pickled, "load_vqgan_pickle", lambda path: model)
    assert "LWM's VQGAN" in convert(capsys, tmp_path / "vqgan", tmp_path / "vqgan.safetensors")
    assert vqgan.vqgan_fingerprint(vqgan.load_vqgan(tmp_path / "vqgan.safetensors")) == vqgan.vqgan_fingerprint(model)
    (tmp_path / "evil").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    monkeypatch.undo()
    said = convert(capsys, tmp_path / "evil", tmp_path / "other.safetensors")
    assert "os.system" in said and not (tmp_path / "other.safetensors").exists()


def test_a_stream_says_no_context(tmp_path, capsys):
    first = families.write(tmp_path / "first", families.FAMILIES["llama2"])
    convert(capsys, first, tmp_path / "a.msgpack")
    assert "give --context TOKENS" in convert(capsys, tmp_path / "a.msgpack", tmp_path / "b", "--heads", "6")
    assert "give" in convert(capsys, tmp_path / "a.msgpack", tmp_path / "b", "--context", "64")
