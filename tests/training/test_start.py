"""A run that begins with a published model: what it takes over, what is new, and what does not fit."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringjax.data.tokenizers import load_tokenizer
from ringjax.inference.trained import TrainedRun
from ringjax.interop.command import ConvertConfig, run_convert
from ringjax.interop.published import open_published
from ringjax.interop.start import open_start
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training.checkpoint import CheckpointError, restore_model
from ringjax.training.load import parse_config
from ringjax.training.loop import train
from ringjax.training.mesh import make_mesh
from ringjax.training.start import drawn_like, first_params
from ringjax.training.yaml_tree import ConfigError
from tests.inference import published

CONFIG = """
init_from: {init_from}
model: {model}
data: {{sources: [{{path: "sample:prose"}}], prefetch: 0}}
training: {{steps: 2, seq_len: 64, batch_size: 2}}
optimizer: {{learning_rate: 1.0e-9}}
mesh: {{shape: "1,1,1,8"}}
logging: {{progress: none, plot: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("published") / "model")


def config(init_from, run_dir="runs/none", model="{dtype: float32}", **overrides):
    text = CONFIG.format(init_from=init_from, model=model)
    pairs = [("run_dir", str(run_dir)), *((name, str(value)) for name, value in overrides.items())]
    return parse_config(text, overrides=pairs, open_start=open_start)


def params(model):
    return {"/".join(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def test_a_config_takes_over_what_it_leaves_out(folder):
    found, theirs = config(folder), open_published(folder).description.config
    for name in ("width", "layers", "heads", "key_heads", "head_size", "vocab_size", "tie_embeddings", "norm_eps"):
        assert getattr(found.model, name) == getattr(theirs, name), name
    assert found.model.vision_vocab_size == 0 and found.model.rope_theta == theirs.rope_theta
    assert found.data.tokenizer == str(folder)
    changed = config(folder, model="{rope_theta: 1.0e6, vision_codes: 64, vision_vocab_size: 66}")
    assert (changed.model.rope_theta, changed.model.vision_vocab_size) == (1e6, 66)
    assert config(folder, **{"data.tokenizer": "sample"}).data.tokenizer == "sample"


def test_what_does_not_fit_is_said_when_the_config_is_read(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"model.layers 3 is 2 in .*, which init_from names") as raised:
        config(folder, model="{layers: 3, ffn_width: 8}")
    assert len(raised.value.problems) == 2
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    with pytest.raises(ConfigError, match="line 2: init_from: .*config.json"):
        config(tmp_path)
    with pytest.raises(ConfigError, match="init_from: .*not a whole LWM stream|init_from: .*is no model"):
        (tmp_path / "stream.msgpack").write_bytes(b"nothing")
        config(tmp_path / "stream.msgpack")


def test_a_run_begins_with_a_published_model(folder, tmp_path):
    run = train(config(folder, tmp_path / "run"), open_start)
    _, model = restore_model(run)
    wanted = params(open_published(folder).load())
    found = params(model)
    assert wanted.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-6, err_msg=name)
    # The folder is enough: tokenizer and chat template are in it.
    assert load_tokenizer(str(run / "tokenizer")).fingerprint == load_tokenizer(str(folder)).fingerprint
    assert "chat_template" in json.loads((run / "tokenizer" / "tokenizer_config.json").read_text())
    assert TrainedRun.load(run).tokenizer.eos_id == 2
    # Going on needs no published model.
    more = {"training.steps": 3, "data.tokenizer": folder} | shape(folder)
    train(config("gone", tmp_path / "run", **more), open_start)
    assert restore_model(run, step=3)


def shape(folder):
    return {f"model.{name}": value for name, value in open_start(str(folder)).inherited.items() if value is not None}


def test_nobody_reads_a_published_model_without_an_opener(folder, tmp_path):
    with pytest.raises(ValueError, match="pass open_start"):
        train(config(folder, tmp_path / "run"))
    (tmp_path / "no").mkdir()
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        train(config(tmp_path / "no", tmp_path / "run", **{"data.tokenizer": "bytes"} | shape(folder)), open_start)


@pytest.mark.parametrize("tied", [True, False])
def test_tables_of_pictures_are_new_and_as_loud_as_the_text(tmp_path, tied):
    folder = published.write(tmp_path / "model", tie_word_embeddings=tied)
    found = config(folder, model="{vision_codes: 1024, vision_vocab_size: 1026, dtype: float32}")
    start, made = open_start(str(folder)), []
    for mesh in ("1,1,1,8", "1,2,2,2"):
        state, said = first_params(start, found.model, Parallel(make_mesh(mesh)), seed=1)
        made.append(params(nnx.merge(nnx.graphdef(Transformer.abstract(found.model)), state)))
    assert len(said) == (2 if tied else 3) and "vte/embedding [1026, 24] is new" in said[-1]
    assert ("vision_head/kernel" in made[0]) != tied
    for name, value in made[0].items():
        np.testing.assert_allclose(value, made[1][name], atol=1e-6, err_msg=name)  # whatever the mesh
    text = params(open_published(folder).load())
    np.testing.assert_array_equal(made[0]["wte/embedding"], text["wte/embedding"])
    for new, old in (("vte/embedding", "wte/embedding"), ("vision_head/kernel", "lm_head/kernel")):
        if new in made[0]:
            tokens = 0 if new.startswith("vte") else 1
            for statistic in (np.mean, np.std):
                a, b = statistic(made[0][new], tokens), statistic(text[old], tokens)
                np.testing.assert_allclose(a, b, atol=0.15 * np.std(text[old]))


def test_rows_are_drawn_component_by_component():
    table = jnp.asarray(np.random.default_rng(0).normal([0, 5], [1, 0.1], (400, 2)), jnp.float32)
    drawn = np.asarray(drawn_like(table, jax.random.key(0), shape=(4000, 2), axis=0))
    np.testing.assert_allclose(drawn.mean(0), [0, 5], atol=0.1)
    np.testing.assert_allclose(drawn.std(0), [1, 0.1], rtol=0.15)


def test_a_run_begins_with_a_stream_that_does_not_tell_its_heads(folder, tmp_path):
    untied = published.write(tmp_path / "model", tie_word_embeddings=False, num_key_value_heads=6)
    stream = tmp_path / "model.msgpack"
    run_convert(ConvertConfig(str(untied), str(stream), dtype="float32"))
    with pytest.raises(ConfigError, match="number of heads"):
        config(stream)
    found = config(stream, tmp_path / "run", "{heads: 6, rope_theta: 5.0e4, dtype: float32}",
                   **{"data.tokenizer": untied})  # fmt: skip
    assert (found.model.layers, found.model.rope_theta) == (2, 5e4)
    _, model = restore_model(train(found, open_start))
    wanted = params(open_published(untied).load())
    for name, value in params(model).items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-6, err_msg=name)


def test_a_gguf_file_gives_model_and_tokenizer(tmp_path):
    gguf = pytest.importorskip("tests.interop.test_gguf")
    file = gguf.write(tmp_path, gguf.weights(tied=True))
    found = config(file, tmp_path / "run")
    assert found.data.tokenizer == str(file) and found.model.tie_embeddings
    run = train(found, open_start)
    _, model = restore_model(run)
    for name, value in params(open_published(file).load()).items():
        np.testing.assert_allclose(params(model)[name], value, atol=1e-6, err_msg=name)
    assert Path(run / "tokenizer" / "tokenizer.json").is_file()
