"""A run of adapters: two stages, resuming, what its checkpoints hold, and the ways out of it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from ringjax.evaluation.eval_command import run_eval
from ringjax.evaluation.eval_config import PerplexityConfig
from ringjax.evaluation.reading import GREEDY
from ringjax.inference.command import run_generate
from ringjax.inference.generate_config import GenerateConfig
from ringjax.inference.text_model import TextModel
from ringjax.inference.trained import TrainedRun
from ringjax.interop.command import ConvertConfig, run_convert
from ringjax.interop.published import open_published
from ringjax.interop.runs import Checkpoint, open_model
from ringjax.interop.start import open_start
from ringjax.models import lora
from ringjax.training.checkpoint import CheckpointError, last_whole, restore_model
from ringjax.training.load import parse_config, parse_run, to_yaml
from ringjax.training.loop import train
from ringjax.training.metrics import read_metrics
from ringjax.training.yaml_tree import ConfigError
from tests.inference import published
from tests.interop.test_peft import logits

CONFIG = """
init_from: {init_from}
lora: {{rank: 2, alpha: 4, targets: [wq, wo, "w?"], also: [norms]}}
model: {{dtype: float32, param_dtype: bfloat16}}
data: {{sources: [{{path: "sample:prose"}}], heldout: [{{path: "sample:prose"}}], prefetch: 0}}
optimizer: {{learning_rate: 1.0e-2, weight_decay: 0}}
mesh: {{shape: "1,2,1,4"}}
checkpoint: {{every: 2, keep_last: 1, keep_stages: true}}
logging: {{progress: none, plot: false}}
stages:
  - {{name: short, model: {{rope_theta: 2.0e4, shifted_group: 16}}, training: {{steps: 3, seq_len: 64, batch_size: 2}}}}
  - {{name: long, model: {{rope_theta: 5.0e4}}, training: {{steps: 3, seq_len: 128, batch_size: 2, eval_every: 3,
      eval_batches: 1}}}}
"""


def config(folder, run_dir, **overrides):
    pairs = [("run_dir", str(run_dir)), *((name, str(value)) for name, value in overrides.items())]
    return parse_config(CONFIG.format(init_from=folder), overrides=pairs, open_start=open_start)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("published") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return train(config(folder, tmp_path_factory.mktemp("lora") / "run"), open_start)


def curve(run):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def test_checkpoints_hold_adapters_and_norms_alone(run, folder):
    path, info = last_whole(run / "checkpoints")
    names = set(info["parameters"])
    assert all("low_rank" in name or "norm" in name or "ln_f" in name for name in names)
    assert {x.split("[")[0] for x in info["parameters"].values()} == {"float32"}
    moments = {name.split(".", 2)[-1] for name in info["optimizer"]}
    assert not any("wte" in name or name.endswith("wq.kernel.value") for name in moments)
    assert info["base"] == {"path": str(folder), "fingerprint": open_published(folder).fingerprint}
    with pytest.raises(CheckpointError, match="holds adapters alone"):
        restore_model(run)


def test_what_is_frozen_stays(run, folder):
    assert len(curve(run)) == 6 and all(norm > 0 for *_, norm in curve(run))
    found = Checkpoint.find(run)
    state = dict(nnx.to_flat_state(nnx.state(found.adapted())))
    base = dict(nnx.to_flat_state(nnx.state(open_published(folder).load(param_dtype="bfloat16"))))
    same = [path for path in base if np.array_equal(state[path].get_value(), base[path].get_value())]
    changed = {".".join(path) for path in set(base) - set(same)}
    assert changed == {"h.attention_norm.kernel", "h.ffn_norm.kernel", "ln_f.kernel"}
    assert all(np.abs(np.asarray(x.get_value())).max() > 0 for path, x in state.items() if path[-1] == "b")


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_goes_on_where_it_was_stopped(run, folder, tmp_path, steps, monkeypatch):
    """In the first stage and in the second; the frozen model is read again."""
    from ringjax.training import stage

    save = stage.StageLoop.save

    class Stop(Exception):
        pass

    def stopping(self, step, fed, **options):
        save(self, step, fed, **options)
        if step == steps:
            self.owner.store.wait()
            raise Stop

    monkeypatch.setattr(stage.StageLoop, "save", stopping)
    with pytest.raises(Stop):
        train(config(folder, tmp_path / "run"), open_start)
    monkeypatch.undo()
    train(config(folder, tmp_path / "run"), open_start)
    assert curve(tmp_path / "run") == curve(run)


def test_another_base_is_refused(run, folder, tmp_path):
    other = published.write(tmp_path / "other", tie_word_embeddings=False, rope_theta=777.0)
    with pytest.raises(CheckpointError, match="is not the model that this run's adapters were trained on"):
        train(config(other, run, **{"stages.1.training.steps": 4}), open_start)
    with pytest.raises(CheckpointError, match="is a run of adapters alone: merge them"):
        made = config(folder, tmp_path / "next")
        train(dataclasses.replace(made, init_from=str(run)), open_start)


def test_stages_open_by_name_with_their_theta(run):
    short, long = (open_model(run, stage).description for stage in ("short", "long"))
    assert (short.context, short.config.rope_theta) == (64, 2e4)
    assert (long.context, long.config.rope_theta) == (128, 5e4)
    assert short.config.shifted_group is None  # inference sees everything
    assert open_model(run).fingerprint == open_model(run, "long").fingerprint != open_model(run, "short").fingerprint
    with pytest.raises(CheckpointError, match=r"no whole checkpoint of stage 'longer'; .*long \(step 6\), short"):
        open_model(run, "longer")
    with pytest.raises(ValueError, match="is for the folder of a run"):
        open_model("model.gguf", "short")


def test_the_adapter_alone_gives_the_same_model(run, folder, tmp_path):
    for stage in ("short", "long"):
        said = run_convert(ConvertConfig(str(run), str(tmp_path / stage), adapter=True, stage=stage, dtype="float32"))
        assert "a LoRA adapter for" in said
        wide = open_model(run, stage)
        merged = open_model(folder, adapter=tmp_path / stage)
        assert merged.description.config == wide.description.config
        # The run's base is bfloat16, as it was trained on; the published one float32.
        a, b = (logits(x.load()) for x in (wide, merged))
        assert np.abs(a - b).max() < 0.2 * np.abs(a - logits(open_published(folder).load())).max()
    fields = json.loads((tmp_path / "long" / "ringjax.json").read_text())
    assert fields == {"context": 128, "model": {"rope_theta": 5e4}}
    named = ConvertConfig(str(run), str(tmp_path / "named"), adapter=True, base="a/name")
    assert "a LoRA adapter for a/name" in run_convert(named)
    about = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("named", "long")]
    assert [fields["base_model_name_or_path"] for fields in about] == ["a/name", str(folder)]
    with pytest.raises(ValueError, match="base '' names no model; give a name"):
        ConvertConfig(str(run), str(tmp_path / "x"), adapter=True, base="")
    for wrong, what in ((dict(source=str(folder), adapter=True), "adapter True"), (dict(base="a/name"), "base a/name")):
        with pytest.raises(ValueError, match=f"{what} says nothing about"):
            run_convert(ConvertConfig(**{"source": str(run), "target": str(tmp_path / "x"), **wrong}))
    full = run_convert(ConvertConfig(str(run), str(tmp_path / "merged"), dtype="float32"))
    assert "a Hugging Face folder" in full
    merged = open_published(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged.load()), logits(open_model(run).load()), atol=1e-5)


def test_a_run_chats_and_writes(run):
    model = TextModel.load(run, dtype="float32")
    assert model.template is not None and model.stop_ids == (2,) and model.context == 128
    ids = model.chat_ids([{"role": "user", "content": "hello"}])
    assert ids and "".join(model.write(model.session(64), ids, max_new_tokens=4, sampling=GREEDY)) is not None
    assert TrainedRun.load(run).continue_text(["a"], max_new_tokens=2, sampling=GREEDY)


def test_the_gradient_does_not_depend_on_the_mesh(run, folder, tmp_path):
    small = {"stages.0.training.steps": 2, "mesh.shape": "2,1,1,4", "mesh.layout": "zigzag"}
    other = train(config(folder, tmp_path / "run", **small), open_start)
    for (_, a, norm_a), (_, b, norm_b) in zip(curve(run)[:2], curve(other)[:2]):
        np.testing.assert_allclose([a, norm_a], [b, norm_b], rtol=2e-3)  # the frozen products are of bfloat16 weights


def test_a_stage_is_evaluated_and_so_is_an_adapter(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 40)
    run_convert(ConvertConfig(str(run), str(tmp_path / "adapter"), adapter=True, stage="short", dtype="float32"))
    options = dict(lengths=(32,), rows=1, buckets=2, haystack=str(text), progress="none", dtype="float32")
    losses = {}
    for name, asked in {
        "short": dict(model=str(run), stage="short"), "long": dict(model=str(run)),
        "adapter": dict(model=str(folder), adapter=str(tmp_path / "adapter")), "base": dict(model=str(folder)),
    }.items():  # fmt: skip
        run_eval(PerplexityConfig(output=str(tmp_path / name), **asked, **options))
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines()
        losses[name] = json.loads(lines[1])["loss"]
    assert losses["adapter"] == pytest.approx(losses["short"], rel=0.02)  # the run's base is bfloat16
    assert len({round(loss, 2) for loss in (losses["short"], losses["long"], losses["base"])}) == 3
    with pytest.raises(ValueError, match="model"):  # another adapter is another model: its answers don't mix
        run_eval(PerplexityConfig(model=str(folder), output=str(tmp_path / "adapter"), **options))


def test_generate_takes_a_stage_and_an_adapter(run, folder, tmp_path):
    run_convert(ConvertConfig(str(run), str(tmp_path / "adapter"), adapter=True))
    said = []
    asked = dict(prompt="a", max_new_tokens=2, temperature=0.0)
    run_generate(GenerateConfig(str(folder), adapter=str(tmp_path / "adapter"), **asked), said.append)
    run_generate(GenerateConfig(str(run), stage="short", **asked), said.append)
    assert "".join(said).startswith("a")
    with pytest.raises(NotImplementedError, match="--adapter"):
        run_generate(GenerateConfig(str(run), adapter=str(tmp_path / "adapter"), **asked), said.append)
    with pytest.raises(NotImplementedError, match="--stage"):
        run_generate(GenerateConfig(str(folder), stage="short", **asked), said.append)


def test_configs(folder):
    made = config(folder, "runs/none")
    assert made.lora == lora.LoraConfig(2, 4.0, ("wq", "wo", "w?"), also=("norms",))
    assert parse_run(to_yaml(made)) == made
    with pytest.raises(ConfigError, match="lora without init_from"):
        parse_config("{model: {size: debug}, data: {}, lora: {rank: 4}}")
    with pytest.raises(ConfigError, match="lora.dropout 0.1 .* is not here"):
        config(folder, "runs/none", **{"lora.dropout": 0.1})


def test_frozen_weights_have_no_gradient_in_the_program(folder):
    """Adapters on one kind of layer: the compiled step makes no gradient as large as a frozen table."""
    from ringjax.training.mesh import make_mesh
    from ringjax.training.tasks import make_tasks

    made = config(folder, "runs/none", **{"lora.targets": "[wq]", "lora.also": "[]", "mesh.shape": "1,1,1,8"})
    (task, _), mesh = make_tasks(made), make_mesh("1,1,1,8")
    trainer = task.trainer(mesh, 0, 0)
    trained = {".".join(path) for path, _ in nnx.to_flat_state(trainer.abstract.params)}
    assert trained == {"h.attention.wq.low_rank.a", "h.attention.wq.low_rank.b"}
    moments = [x for x in jax.tree.leaves(trainer.abstract.optimizer) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(trainer.abstract.params))
