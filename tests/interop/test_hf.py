"""Hugging Face folders: the same logits, exact round trips, on any mesh; and what is refused."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ringjax.interop.hf import load_hf, read_description, save_hf
from ringjax.interop.hf_config import read_hf_config, write_hf_config
from ringjax.interop.names import hf_recipes
from ringjax.interop.tensors import INDEX, SafetensorsSource
from ringjax.models import ModelConfig, Parallel, Transformer
from tests.interop import families, make_golden, parity
from tests.models import cases

TOLERANCE = 1e-4  # of logits of about 10, float32 on both sides
BASE = families.FAMILIES["llama2"]


@pytest.fixture(scope="module")
def golden():
    with np.load(make_golden.GOLDEN) as file:
        return dict(file)


@pytest.fixture
def folder(tmp_path):
    return families.write(tmp_path / "model", BASE)


def logits(model) -> np.ndarray:
    return parity.logits(model, families.tokens())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_those_of_transformers(golden, tmp_path, name):
    """golden.npz: transformers in float32 (tests/interop/make_golden.py)."""
    model = load_hf(families.write(tmp_path / "model", families.FAMILIES[name]))
    assert np.abs(make_golden.ends(logits(model)) - golden[name]).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_transformers_says_the_same_today(tmp_path, name):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    fields = families.FAMILIES[name]
    ours = save_hf(load_hf(families.write(tmp_path / "model", fields)), tmp_path / "ours", context=128, dtype="float32")
    found = make_golden.logits(ours)
    assert np.abs(make_golden.ends(found) - make_golden.ends(logits(load_hf(ours)))).max() <= TOLERANCE


@pytest.mark.parametrize("name", families.FAMILIES)
def test_round_trips_are_exact(tmp_path, name):
    fields = families.FAMILIES[name]
    first = families.write(tmp_path / "model", fields)
    model = load_hf(first)
    second = save_hf(model, tmp_path / "again", context=128, dtype="float32", shard_bytes=9000)
    assert len(list(second.glob("model-*.safetensors"))) > 1 and (second / INDEX).is_file()
    again = load_hf(second)
    assert again.config == model.config and read_description(second).context == 128
    chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(model))
    source = SafetensorsSource(second)
    for tensor, expected in families.weights(fields).items():
        whole = tuple(slice(None) for _ in expected.shape)
        np.testing.assert_array_equal(source.read(tensor, whole), expected, tensor)


@pytest.mark.parametrize("axes", [(1, 2, 2, 2), (1, 1, 1, 4), (1, 1, 2, 1), (2, 4, 1, 1)])
def test_any_mesh_gets_the_same_parameters(folder, axes):
    whole, mesh = load_hf(folder), cases.mesh(*axes)
    cut = load_hf(folder, Parallel(mesh))
    chex.assert_trees_all_equal(jax.tree.leaves(cut), jax.tree.leaves(whole))
    expected = Transformer.create(cut.config, 0, Parallel(mesh))
    assert [x.sharding for x in jax.tree.leaves(cut)] == [x.sharding for x in jax.tree.leaves(expected)]


def test_each_device_reads_its_own_part(folder, monkeypatch):
    """No tensor is whole in host memory where it is cut."""
    read, largest = SafetensorsSource.read, {}

    def spy(source, name, index):
        part = read(source, name, index)
        largest[name] = max(largest.get(name, 0), part.size)
        return part

    monkeypatch.setattr(SafetensorsSource, "read", spy)
    load_hf(folder, Parallel(cases.mesh(1, 1, 2, 4)))
    source = SafetensorsSource(folder)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        assert largest[name] <= np.prod(source.shapes[name]) // 8, name


def test_types(folder):
    model = load_hf(folder, dtype="bfloat16", param_dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(model)} == {"bfloat16"} and model.config.dtype == "bfloat16"
    saved = save_hf(model, folder.parent / "b", context=64)
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "bfloat16"
    chex.assert_trees_all_equal(jax.tree.leaves(load_hf(saved, param_dtype="bfloat16")), jax.tree.leaves(model))


def test_row_order_of_rotated_heads():
    """Ours has pairs side by side; Hugging Face's has a head's halves one after the other."""
    config = ModelConfig(width=8, ffn_width=8, layers=1, heads=1, vocab_size=8, vision_vocab_size=0)
    recipe = hf_recipes(config)["h", "attention", "wq", "kernel"]

    class Rows:
        def read(self, name, index):
            return np.broadcast_to(np.arange(8.0)[:, None], (8, 8))[index]

    every = slice(0, 8)
    assert recipe.read(Rows(), (slice(0, 1), every, every))[0, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert recipe.read(Rows(), (slice(0, 1), every, slice(2, 5)))[0, 0].tolist() == [1, 5, 2]


REFUSED = {
    "model_type": ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported: the families are llama, mistral"),
    "architectures": ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForCausalLM"),
    "unknown": ({"logit_scale": 0.5}, "logit_scale: 0.5, unknown here; it may change what the model computes"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: the feed-forward is SwiGLU"),
    "bias": ({"attention_bias": True}, "attention_bias True is not supported"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias True is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "only weights that are not quantised"),
    "own code": ({"auto_map": {"AutoModel": "model.py"}}, "it has code of its own, which is not run"),
    "partial": ({"partial_rotary_factor": 0.5}, "all of a head is rotated"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "linear, llama3, yarn, not dynamic"),
    "extra rule": ({"rope_scaling": {"type": "linear", "factor": 2.0, "low": 1}}, "linear has no low"),
    "window": ({"sliding_window": 8}, "llama has none; mistral does"),
    "some layers": (
        {"model_type": "qwen2", "architectures": None, "use_sliding_window": True, "max_window_layers": 1},
        "all 2 layers have the window, or none",
    ),
    "layer types": (
        {"model_type": "mistral", "architectures": None, "layer_types": ["full_attention", "sliding_attention"]},
        "all layers have full attention, or all the same window",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_maths_is_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(NotImplementedError, match=message):
        read_hf_config({**BASE, **changes})


def test_wrong_configs():
    for changes, message in (
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_key_value_heads": 4}, "config.json: kv_heads 4 does not divide heads 6"),
        ({"rope_scaling": {"type": "linear"}}, "linear has no factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs original_max_position"),
        ({"hidden_size": "24"}, "hidden_size '24' is not int"),
    ):
        with pytest.raises(ValueError, match=message):
            read_hf_config({**BASE, **changes})


def test_defaults_of_each_family():
    fields = {name: value for name, value in families.FAMILIES["mistral"].items() if name != "sliding_window"}
    assert read_hf_config(fields).config.window == 4096
    assert read_hf_config({**families.FAMILIES["qwen2 window"], "max_window_layers": 2}).config.window is None


def test_what_hugging_face_lacks_is_not_written():
    config = dict(width=8, ffn_width=8, layers=1, heads=1, vocab_size=8)
    sinks = {"sinks": 2, "window": 4, "vision_vocab_size": 0}
    softcap = {"softcap": 5.0, "vision_vocab_size": 0}
    for more, message in (({}, "no vision tables"), (softcap, "softcap 5.0"), (sinks, "sinks 2: none of")):
        with pytest.raises(NotImplementedError, match=message):
            write_hf_config(ModelConfig(**config, **more), 64, "float32")


def damaged(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_do_not_fit_are_listed(folder):
    damaged(folder, lm_head__weight=None, model__norm__weight=np.zeros(23, np.float32), odd=np.zeros(1, np.float32))
    with pytest.raises(ValueError) as caught:
        load_hf(folder)
    message = str(caught.value)
    for part in ("missing lm_head.weight", "unknown odd", r"model.norm.weight is (23,), not (24,)"):
        assert part in message
    assert str(folder) in message


def test_buffers_of_old_files_are_left_aside(folder):
    damaged(folder, model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(2, np.float32))
    load_hf(folder)


def test_a_head_beside_tied_embeddings(tmp_path):
    fields = families.FAMILIES["tied"]
    tensors = families.weights(fields)
    table = tensors["model.embed_tokens.weight"]
    same = families.write(tmp_path / "same", fields, {**tensors, "lm_head.weight": table})
    assert load_hf(same).lm_head is None
    other = families.write(tmp_path / "other", fields, {**tensors, "lm_head.weight": 0 * table})
    with pytest.raises(ValueError, match="differs from model.embed_tokens.weight in rows 0 … 63.*set it to false"):
        load_hf(other)


def test_damaged_files(folder, tmp_path):
    content = (folder / "model.safetensors").read_bytes()
    for size in (0, 4, 100, 3000, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load_hf(folder)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config.json is not whole JSON: .*column"):
        load_hf(folder)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_hf(tmp_path)


def test_tampered_indices(folder):
    model = load_hf(folder)
    shards = save_hf(model, folder.parent / "shards", context=64, dtype="float32", shard_bytes=9000)
    index = json.loads((shards / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    for changes, message in (
        ({moved: second}, f"{moved} is not in {second}"),
        ({moved: "../model/model.safetensors"}, "is not a file of the folder"),
        ({moved: "absent.safetensors"}, "absent.safetensors is missing"),
    ):
        (shards / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **changes}}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_hf(shards)
    (shards / INDEX).write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match="has no weight_map"):
        load_hf(shards)


def test_integer_weights_are_refused(folder):
    damaged(folder, lm_head__weight=np.zeros((64, 24), np.int8))
    with pytest.raises(ValueError, match="lm_head.weight is I8, not one of BF16, F16, F32, F64; quantised"):
        load_hf(folder)


def test_nothing_is_overwritten_or_left_half_written(folder, monkeypatch):
    model, target = load_hf(folder), folder.parent / "out"
    target.mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        save_hf(model, target, context=64)
    shutil.rmtree(target)
    monkeypatch.setattr("ringjax.interop.hf._write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_hf(model, target, context=64)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": 10**9}, "layers 1000000000 is more than 4096"),
        ({"num_attention_heads": 2**31 - 1, "num_key_value_heads": 2}, "heads 2147483647 is more than"),
        ({"vocab_size": 2**64}, "vocab_size 18446744073709551616 is beyond 2147483647"),
        ({"rope_theta": "a"}, "rope_theta 'a' is not int or float"),
        ({"rope_scaling": [1]}, r"rope_scaling \[1\] is not dict"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": {}, "factor": 2}},
            "rope_theta {} must be a number",
        ),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "the rules are linear, llama3, yarn"),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": "a"}},
            "'a' is no number of tokens",
        ),
        ({"layer_types": [["full_attention"]]}, "is not a list of str"),
        ({"eos_token_id": [{}]}, "is not a list of int"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not str"),
        ({"hidden_size": True}, "hidden_size True is not int"),
        ({"x" * 70_000: "y" * 70_000}, "unknown here"),
    ],
)
def test_values_of_other_kinds_and_sizes(changes, words):
    with pytest.raises((ValueError, NotImplementedError), match=words) as error:
        read_hf_config({**families.FAMILIES["llama2"], **changes})
    assert str(error.value).startswith("config.json") and len(str(error.value)) < 1000


def test_an_index_that_leads_out_of_its_folder(tmp_path):
    families.write(tmp_path, families.FAMILIES["llama2"])
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    for name in ("../a.safetensors", "/etc/hostname", "a" * 300, "\0", ".."):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(
            ValueError, match="model.safetensors.index.json names .*(not a file of|no name of|longer than|leads out)"
        ):
            SafetensorsSource(tmp_path)
