"""Adapters in PEFT's form: names, places of q and k, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ringjax.interop.hf import load_hf
from ringjax.interop.peft import CHANGES, CONFIG, SAMPLE, WEIGHTS, Adapter, save_adapter
from ringjax.interop.runs import open_model
from ringjax.models import lora
from ringjax.models.lora import LoraConfig
from ringjax.models.sizes import SIZES
from tests.inference import published
from tests.interop import families

RANK, ALPHA = 4, 6.0
FIELDS = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1, "bias": "none",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "modules_to_save": None, "use_rslora": False, "inference_mode": True, "base_model_name_or_path": "elsewhere",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("peft") / "model", tie_word_embeddings=False)


def theirs(folder, drop=(), seed=0):
    """PEFT's tensors for every linear layer of a Hugging Face folder, and the weights with them merged in by hand."""
    rng, adapters, merged = np.random.default_rng(seed), {}, load_file(folder / "model.safetensors")
    for name in sorted(merged):
        if not name.endswith("_proj.weight") or any(part in name for part in drop):
            continue
        out, inputs = merged[name].shape
        a, b = (rng.standard_normal(shape).astype(np.float32) * 0.3 for shape in ((RANK, inputs), (out, RANK)))
        module = name.removesuffix(".weight")
        adapters[f"base_model.model.{module}.lora_A.weight"] = a
        adapters[f"base_model.model.{module}.lora_B.weight"] = b
        merged[name] = (merged[name] + ALPHA / RANK * (b.astype(np.float64) @ a)).astype(np.float32)
    return adapters, merged


def write(path, tensors, **changes):
    path.mkdir()
    (path / CONFIG).write_text(json.dumps({**FIELDS, **changes}))
    save_file(tensors, path / WEIGHTS)
    return path


def logits(model):
    tokens = jnp.asarray(families.tokens())
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return np.asarray(model.text_logits(model.hidden(tokens, jnp.zeros(tokens.shape, bool), positions)))


def test_an_adapter_of_peft_gives_the_logits_of_its_formula(folder, tmp_path):
    """W + alpha/r · B · A in Hugging Face's own tensors, loaded as a model; q and k change places on both ways."""
    adapters, merged = theirs(folder)
    path = write(tmp_path / "adapter", adapters)
    fields = json.loads((folder / "config.json").read_text())
    wanted = logits(load_hf(families.write(tmp_path / "merged", fields, merged)))
    found = logits(open_model(folder, adapter=path).load())
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found - logits(load_hf(folder))).max() > 1


def test_the_package_has_one_for_smollm2():
    adapter = Adapter.read(SAMPLE)
    made, tensors = adapter.params(SIZES["smollm2-135m"])
    assert (made.rank, adapter.context, adapter.changes) == (16, 131_072, {"rope_theta": 4e6})
    assert len(made.targets) == 7 and all(np.isfinite(tensor).all() and np.any(tensor) for tensor in tensors.values())
    assert sum(file.stat().st_size for file in adapter.path.iterdir()) < 10_000_000
    with pytest.raises(ValueError, match="does not fit"):
        adapter.params(dataclasses.replace(SIZES["smollm2-135m"], layers=29))
    with pytest.raises(ValueError, match="no adapter sample:any-to-any; sample:smollm2-128k is"):
        Adapter.read("sample:any-to-any")


def test_what_is_written_is_what_was_read(folder, tmp_path):
    adapters, _ = theirs(folder)
    norms = {f"base_model.model.model.layers.{i}.input_layernorm.weight": np.full(24, i, np.float32) for i in range(2)}
    norms |= {f"base_model.model.model.layers.{i}.post_attention_layernorm.weight": np.full(24, i, np.float32)
              for i in range(2)}  # fmt: skip
    norms["base_model.model.model.norm.weight"] = np.full(24, 3, np.float32)
    path = write(tmp_path / "adapter", adapters | norms)
    config = open_model(folder).description.config
    made, params = Adapter.read(path).params(config)
    assert made.also == ("norms",) and made.scale == ALPHA / RANK and len(made.targets) == 7
    abstract = lora.abstract(config, made)
    state = [(p, leaf.replace(jnp.asarray(params[p])) if p in params else leaf)
             for p, leaf in nnx.to_flat_state(nnx.state(abstract))]  # fmt: skip
    model = nnx.merge(nnx.graphdef(abstract), nnx.from_flat_state(state))
    longer = dataclasses.replace(config, rope_theta=5e5)
    save_adapter(model, made, tmp_path / "again", base="elsewhere", context=4096, base_config=longer)
    found = load_file(tmp_path / "again" / WEIGHTS)
    assert found.keys() == (adapters | norms).keys()
    for name, tensor in (adapters | norms).items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    fields = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert sorted(FIELDS["target_modules"]) == fields["target_modules"]
    assert fields["modules_to_save"] == ["input_layernorm", "norm", "post_attention_layernorm"]
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (RANK, ALPHA, "elsewhere")
    # RoPE's base, which PEFT has no place for, comes back with the context.
    assert json.loads((tmp_path / "again" / CHANGES).read_text()) == {
        "context": 4096, "model": {"rope_theta": config.rope_theta},
    }  # fmt: skip
    described = open_model(folder, adapter=tmp_path / "again").description
    assert (described.context, described.config.rope_theta) == (4096, config.rope_theta)
    with pytest.raises(FileExistsError):
        save_adapter(model, made, tmp_path / "again", base="elsewhere")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora True is not supported; only False"),
        ({"bias": "all"}, "bias 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"new_maths": 2}, "new_maths 2 is unknown here"),
    ],
)
def test_refused_kinds(folder, tmp_path, changes, words):
    path = write(tmp_path / "adapter", theirs(folder)[0], **changes)
    with pytest.raises(NotImplementedError, match=words):
        open_model(folder, adapter=path)


def test_refused_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        Adapter.read(tmp_path)
    good = theirs(folder)[0]
    first = next(iter(good))
    faults = {
        "missing": {name: x for name, x in good.items() if name != first},
        "wide": {**good, first: np.zeros((RANK + 1, good[first].shape[1]), np.float32)},
        "other": {**good, "base_model.model.model.layers.0.mlp.lora_magnitude": np.zeros(3, np.float32)},
        "none": {"base_model.model.model.norm.weight": np.ones(24, np.float32)},
    }
    for name, tensors in faults.items():
        with pytest.raises(ValueError, match="adapter_model.safetensors"):
            open_model(folder, adapter=write(tmp_path / name, tensors))
    for name, changes in {"rank": {"r": 0}, "alpha": {"lora_alpha": "8"}, "typed": {"r": True}}.items():
        with pytest.raises(ValueError, match="must be a whole number and one above 0"):
            open_model(folder, adapter=write(tmp_path / name, good, **changes))
    path = write(tmp_path / "cut", good)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_model(folder, adapter=path)
    path = write(tmp_path / "odd", good)
    for text in ('{"model": {"layers": 3}}', '{"model": {"rope_theta": -1}}', '{"context": 0}', '{"model": 3}'):
        (path / CHANGES).write_text(text)
        with pytest.raises(ValueError, match="ringjax.json"):
            open_model(folder, adapter=path)


def test_an_adapter_on_some_layers_kinds_only(folder, tmp_path):
    adapters, merged = theirs(folder, drop=("mlp", "o_proj"))
    path = write(tmp_path / "adapter", adapters, target_modules=["q_proj", "k_proj", "v_proj"])
    fields = json.loads((folder / "config.json").read_text())
    wanted = logits(load_hf(families.write(tmp_path / "merged", fields, merged)))
    np.testing.assert_allclose(logits(open_model(folder, adapter=path).load()), wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_that_nobody_else_has_is_not_written(tmp_path):
    from tests.models import cases

    made = LoraConfig(2, targets=("vision_head",))
    model = lora.with_adapters(cases.model(cases.changed(qkv_bias=False)), made, nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="vision_head.low_rank.*PEFT can't name it"):
        save_adapter(model, made, tmp_path / "adapter", base="x")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by names that are on their way out
def test_peft_itself_gives_the_same_logits(folder, tmp_path):
    """What is written here, loaded by PEFT on transformers' model: adapters on all layers, and the norms."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = open_model(folder).description.config
    made = LoraConfig(RANK, ALPHA, targets=("w?", "lm_head"), also=("norms",), rank_stabilised=True)
    base = load_hf(folder)
    model = lora.with_adapters(base, made, nnx.Rngs(params=1))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(2)
    trained, frozen = lora.split_trained(state, made)
    noise = lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    model = nnx.merge(graph, lora.joined(jax.tree.map(noise, trained), frozen))
    path = save_adapter(model, made, tmp_path / "adapter", base=str(folder), base_config=config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, path).eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(families.tokens(), dtype=torch.long)).logits.numpy()
    assert np.abs(wanted - logits(base)).max() > 1
    np.testing.assert_allclose(logits(model), wanted, atol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"lora_alpha": True},
        {"r": [4]},
        {"x" * 70_000: 1},
        {"bias": "x" * 70_000},
    ],
)
def test_values_of_other_kinds_and_sizes(folder, tmp_path, changes):
    adapters, _ = theirs(folder)
    path = write(tmp_path / "adapter", adapters, **changes)
    with pytest.raises((ValueError, NotImplementedError), match="adapter_config.json: ") as error:
        Adapter.read(path)
    assert len(str(error.value)) < 1000
