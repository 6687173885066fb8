"""The loop end to end on a tiny model and the sample prose: stopped, resumed, damaged, extended."""

import dataclasses
import errno
import json
import os
import signal

import jax
import numpy as np
import pytest

from ringjax.training import checkpoint as ckpt
from ringjax.training import loop, transformer_task
from ringjax.training.checkpoint import CheckpointError, last_whole, restore_model
from ringjax.training.feed import DataEnded
from ringjax.training.load import parse_config
from ringjax.training.metrics import read_metrics
from ringjax.training.stops import BadLoss, Preempted
from ringjax.training.yaml_tree import ConfigError

TINY = """
model:
  {width: 16, ffn_width: 32, layers: 1, heads: 2, vocab_size: 512, vision_vocab_size: 0, dtype: float32, loss_chunk: 64}
data: {sources: [{path: "sample:prose"}], prefetch: 0}
training: {steps: 8, seq_len: 32, batch_size: 8, eval_batches: 1}
optimizer: {learning_rate: 1.0e-2, warmup_steps: 2}
mesh: {shape: "2,1,1,4", simulated_devices: 8}
checkpoint: {every: 3}
logging: {progress: none, plot: false}
"""


def config(folder, **overrides):
    pairs = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    return parse_config(TINY, overrides=[("run_dir", str(folder)), *pairs])


def curve(folder):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def stop_at(monkeypatch, step, action):
    """Run `action` when the metrics of `step` are written."""
    write = loop.MetricsWriter.write

    def stopping(self, record):
        write(self, record)
        if record["step"] == step:
            action()

    monkeypatch.setattr(loop.MetricsWriter, "write", stopping)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    loop.train(config(folder))
    return folder


@pytest.fixture
def half(unbroken, tmp_path):
    """A run that was stopped by SIGTERM after step 5."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted, match="SIGTERM at step 5: saved"):
        stop_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        loop.train(config(tmp_path))
    return tmp_path


def test_a_run_leaves_its_files(unbroken):
    assert [step for step, *_ in curve(unbroken)] == list(range(1, 9))
    assert curve(unbroken)[-1][1] < curve(unbroken)[0][1]
    assert parse_config((unbroken / "config.yaml").read_text()) == config(unbroken)
    assert [step for step, _ in ckpt.step_folders(unbroken / "checkpoints")] == [8, 6]


def test_sigterm_saves_and_the_same_command_goes_on(unbroken, half):
    assert last_whole(half / "checkpoints")[1]["step"] == 5
    loop.train(config(half))
    assert curve(half) == curve(unbroken)  # float for float


def test_a_damaged_checkpoint_costs_steps_and_changes_nothing(unbroken, half, capsys):
    newest = half / "checkpoints" / "step_00000005"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-10])
    loop.train(config(half, logging__progress="plain"))
    said = capsys.readouterr().out
    assert "step_00000005 is damaged" in said and "going on after step 3" in said
    assert curve(half) == curve(unbroken)


def test_no_whole_checkpoint_is_no_reason_to_begin_anew(half):
    for path in (half / "checkpoints").iterdir():
        (path / "ringjax.json").write_text("{}")
    metrics = (half / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint of .* is whole, and .* were: bring back one"):
        loop.train(config(half))
    assert (half / "metrics.jsonl").read_bytes() == metrics


def test_an_evaluation_that_a_signal_came_before_is_made_by_the_next_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Preempted):
        stop_at(patched, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        loop.train(config(tmp_path, training__eval_every=4))
    evaluated = lambda: [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "eval" in r]  # noqa: E731
    assert evaluated() == []
    loop.train(config(tmp_path, training__eval_every=4))
    assert evaluated() == [4, 8]


def told(monkeypatch, losses):
    """Evaluations find these losses one after the other, in each of two sources one more and one less."""
    left = iter(losses)

    def evaluate(params):
        loss = next(left)
        return {name: {"loss": loss + more} for name, more in (("a", -1.0), ("b", 1.0))}

    monkeypatch.setattr(transformer_task.TransformerTask, "evaluator", lambda *_: evaluate)


def test_the_best_checkpoint_is_kept_and_read(tmp_path, monkeypatch):
    """Held-out losses of steps 2, 4, 6 and 8: the run ends with a worse model than it had."""
    options = dict(checkpoint__keep_best=True, checkpoint__keep_last=1, checkpoint__every=100, training__eval_every=2)
    told(monkeypatch, [3.0, 1.5, 2.5, 2.0])
    with monkeypatch.context() as patched, pytest.raises(Preempted):
        stop_at(patched, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        loop.train(config(tmp_path, **options))
    loop.train(config(tmp_path, **options))  # goes on from step 5, and knows what it had
    steps = [step for step, _ in ckpt.step_folders(tmp_path / ckpt.FOLDER)]
    assert steps == [8, 4] and last_whole(tmp_path / ckpt.FOLDER)[1]["step"] == 8
    assert ckpt.find_checkpoint(tmp_path)[1]["step"] == ckpt.find_checkpoint(tmp_path, stage="train")[1]["step"] == 4
    assert ckpt.find_checkpoint(tmp_path)[1]["held_out_loss"] == 1.5
    # A run that begins with it begins with the best.
    begun = loop.train(config(tmp_path / "next", init_from=tmp_path, training__steps=1, checkpoint__every=1))
    best = restore_model(tmp_path)[1].wte.embedding[...]
    moved = restore_model(begun)[1].wte.embedding[...]
    assert np.abs(np.asarray(moved) - np.asarray(best)).max() <= 1.01e-2
    # Where it is damaged the last one is read, and that is said.
    said = []
    (tmp_path / ckpt.FOLDER / "step_00000004" / "ringjax.json").write_text("{}")
    assert ckpt.find_checkpoint(tmp_path, say=said.append)[1]["step"] == 8
    assert said == ["checkpoint step_00000004 is damaged: ringjax.json cannot be read; left out"]


def test_each_stage_has_its_best(tmp_path, monkeypatch):
    told(monkeypatch, [2.0, 3.0, 9.0, 8.0])
    stages = "[{name: one, training: {steps: 4}}, {name: two, training: {steps: 4}}]"
    options = dict(checkpoint__keep_best=True, checkpoint__keep_last=1, checkpoint__every=100, training__eval_every=2)
    loop.train(config(tmp_path, stages=stages, **options))
    found = {name: ckpt.find_checkpoint(tmp_path, stage=name)[1]["step"] for name in ("one", "two")}
    assert found == {"one": 2, "two": 8}


def test_what_keep_best_needs_is_said(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint.keep_best goes by the held-out loss; set training.eval_every"):
        config(tmp_path, checkpoint__keep_best=True)


def test_a_run_goes_on_on_another_mesh(unbroken, half):
    loop.train(config(half, mesh__shape="1,2,1,4", mesh__layout="zigzag"))
    np.testing.assert_allclose(np.array(curve(half)), np.array(curve(unbroken)), rtol=2e-5)


def test_a_finished_run_stays_finished(unbroken, capsys):
    before = (unbroken / "metrics.jsonl").read_bytes()
    loop.train(config(unbroken, logging__progress="plain", logging__plot=True))
    assert "done after step 8" in capsys.readouterr().out
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    assert (unbroken / "loss.png").exists()


def test_another_model_is_refused_by_name(unbroken):
    with pytest.raises(CheckpointError) as caught:
        loop.train(config(unbroken, model__ffn_width=64, training__steps=9))
    assert "h.feed_forward.w1.kernel" in str(caught.value) and "float32[1,16,32] there" in str(caught.value)


def test_other_data_is_refused_by_name(half):
    with pytest.raises(ValueError, match="seed changed"):
        loop.train(config(half, seed=3))


def test_the_model_comes_back_for_inference(unbroken):
    model_config, model = restore_model(unbroken)
    assert model_config == config(unbroken).model
    tokens = np.arange(8, dtype=np.int32)[None]
    hidden = model.hidden(tokens, np.zeros((1, 8), bool), tokens)
    logits = model.text_logits(hidden)
    assert logits.shape == (1, 8, 512) and np.isfinite(logits).all()
    assert np.abs(np.asarray(model.wte.embedding[...])).max() > 0
    with pytest.raises(CheckpointError, match="steps in .*: 8, 6"):
        restore_model(unbroken, step=7)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        restore_model(unbroken / "nowhere")


def test_a_run_begins_with_the_parameters_of_another(unbroken, tmp_path):
    loop.train(config(tmp_path / "new", init_from=unbroken))
    assert curve(tmp_path / "new")[0][1] < curve(unbroken)[0][1] - 0.3
    with pytest.raises(ConfigError, match="init_from: .*nowhere does not exist; give a run's folder"):
        loop.train(config(tmp_path / "other", init_from=unbroken / "nowhere"))
    assert not (tmp_path / "other").exists()


def bad_step(monkeypatch, step, **values):
    """From `step` on the metrics are `values`."""
    real = transformer_task.make_trainer

    def make(*args, **options):
        trainer = real(*args, **options)

        def train_step(state, batch):
            state, metrics = trainer.step(state, batch)
            bad = int(state.step) >= step
            return state, {**metrics, **({k: jax.numpy.float32(v) for k, v in values.items()} if bad else {})}

        return trainer._replace(step=train_step)

    monkeypatch.setattr(transformer_task, "make_trainer", make)


def test_nan_stops_with_the_batch_and_without_a_checkpoint(tmp_path, monkeypatch):
    bad_step(monkeypatch, 6, loss=float("nan"))
    with pytest.raises(BadLoss, match=r"step 6: loss nan.*bad_batch.npz"):
        loop.train(config(tmp_path))
    assert [step for step, *_ in curve(tmp_path)] == [1, 2, 3, 4, 5]
    assert last_whole(tmp_path / "checkpoints")[1]["step"] == 3
    with np.load(tmp_path / "bad_batch.npz", allow_pickle=False) as saved:
        assert int(saved["step"]) == 6 and saved["tokens"].shape == (8, 32)
        assert "lanes" in json.loads(str(saved["loader_state"]))


def test_debugging_stops_where_the_nan_is_made(tmp_path):
    with pytest.raises(BadLoss, match=r"training.debug_nans: .*nan.* encountered"):
        loop.train(config(tmp_path, training__debug_nans=True, optimizer__learning_rate=1e30))


def test_a_full_disk_stops_the_run_with_the_last_whole_checkpoint(tmp_path, monkeypatch):
    real = ckpt.write_manifest

    def full(folder, info):
        if info["step"] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, info)

    monkeypatch.setattr(ckpt, "write_manifest", full)
    with pytest.raises(CheckpointError, match="is full; free some space.*step_00000003"):
        loop.train(config(tmp_path))
    assert last_whole(tmp_path / "checkpoints")[1]["step"] == 3


def test_the_end_of_the_data_is_said_and_saved(tmp_path):
    text = tmp_path / "few.txt"
    text.write_text("Few words. " * 60)
    few = config(tmp_path / "run", data__sources=f"[{{path: {text}}}]", data__epochs=1)
    with pytest.raises(DataEnded, match=r"after step \d: the data has ended; raise data.epochs"):
        loop.train(few)
    assert last_whole(tmp_path / "run" / "checkpoints")[1]["step"] == curve(tmp_path / "run")[-1][0]


def test_a_mesh_that_the_slices_cannot_hold_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    def refuse(shape):
        raise ValueError(f"mesh {shape} cannot be laid over 3 TPU slices")

    monkeypatch.setattr(loop, "make_mesh", refuse)
    with pytest.raises(ConfigError, match="mesh 2,1,1,4 cannot be laid over 3 TPU slices"):
        loop.train(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_bad_runs_are_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="gone.jsonl"):
        loop.train(config(folder, data__sources="[{path: gone.jsonl}]"))
    with pytest.raises(ConfigError, match="has 512 ids and model.vocab_size is 100"):
        loop.train(config(folder, model__vocab_size=100))
    with pytest.raises(ConfigError, match="asks for 16 devices"):
        loop.train(config(folder, mesh__shape="1,1,1,16"))
    assert not folder.exists()


STAGES = """
stages:
  - {name: short, training: {steps: 4, eval_every: 2}}
  - name: long
    model: {rope_theta: 1.0e+6}
    training: {seq_len: 64, batch_size: 4, steps: 4}
    optimizer: {learning_rate: 1.0e-3, schedule: constant}
    mesh: {shape: "1,1,1,8", layout: zigzag}
"""


def test_stages_continue_from_each_other_and_resume_inside(tmp_path, monkeypatch):
    def staged(folder):
        return dataclasses.replace(parse_config(TINY + STAGES), run_dir=str(folder))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(staged(whole))
    records = read_metrics(whole / "metrics.jsonl")
    steps = [(r["step"], r["stage"], r["stage_step"]) for r in records if "loss" in r]
    assert steps == [(s + 1, "short" if s < 4 else "long", s % 4 + 1) for s in range(8)]
    assert [r["step"] for r in records if "eval" in r] == [2, 4]
    assert records[-1]["learning_rate"] == pytest.approx(1e-3)
    losses = [loss for _, loss, _ in curve(whole)]
    assert losses[4] < losses[0] - 0.1  # the second stage begins with what the first one learned

    for step in (4, 6):  # at the end of the first stage, and inside the second
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
            stop_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            loop.train(staged(broken))
    loop.train(staged(broken))
    assert curve(broken) == curve(whole)
    assert restore_model(whole)[0].rope_theta == 1e6
