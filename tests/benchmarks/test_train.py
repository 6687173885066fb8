"""`ringjax bench train`: the steps that are measured are those of training, and nothing is left behind."""

import json
import threading
import time

import pytest

from ringjax import cli
from ringjax.benchmarks import train
from tests.tiny_run import CONFIG


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG + f"run_dir: {tmp_path / 'run'}\n")
    return str(path)


def run(capsys, *arguments):
    code = cli.main(["bench", "train", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_steps_are_measured_and_profiled(capsys, config, tmp_path):
    options = ["--bench.steps", "3", "--bench.warmup", "1", "--bench.top", "5"]
    folders = ["--bench.output", str(tmp_path / "results"), "--bench.profile", str(tmp_path / "profile")]
    code, out, err = run(capsys, config, *options, *folders, "--training.seq_len", "128")
    assert (code, err) == (0, "")
    assert "2 × 128 tokens, 1 micro-batch(es); the config's own" in out and "sp 8, striped ring" in out
    assert "attention backend 'xla'" in out and "not known for this device" in out
    result = json.loads((tmp_path / "results" / "results.json").read_text())["result"]
    assert len(result["seconds"]) == 3 and result["min"] <= result["median"] <= result["max"]
    assert result["tokens_per_second"] == pytest.approx(result["used"] * 2 * 128 / result["median"])
    assert result["parameters"] > 0 and result["mfu"] is None and result["memory"]["temporary"] > 0
    assert 0 < result["losses"][1] < result["losses"][0] + 1
    profile = result["profile"]
    assert profile["devices"] == 8 and len(profile["kernels"]) == 5 and profile["span"] > 0
    assert {"collectives", "fusions"} <= {part["name"] for part in profile["classes"]}
    assert any(part["name"].startswith("ring/rotate") for part in profile["scopes"])
    text = (tmp_path / "results" / "results.md").read_text()
    assert text.startswith("# Training\n\n`ringjax bench train") and "## Where the time of a step goes" in text
    assert not (tmp_path / "run").exists()  # no checkpoints, no metrics


def test_losses_are_those_of_training(capsys, config, tmp_path):
    from ringjax.training.load import load_config
    from ringjax.training.loop import train

    folder = train(load_config(config))
    trained = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    code, _, _ = run(capsys, config, "--bench.steps", "1", "--bench.warmup", "1", "--bench.output", str(tmp_path))
    measured = json.loads((tmp_path / "results.json").read_text())["result"]["losses"]
    assert code == 0 and measured == pytest.approx(trained)


def test_flops_are_those_of_the_steps_that_are_timed(capsys, config, tmp_path):
    from ringjax.training.feed import Feed
    from ringjax.training.load import load_config
    from ringjax.training.mesh import make_mesh
    from ringjax.training.transformer_task import step_flops

    options = ["--bench.steps", "2", "--bench.warmup", "1", "--data.packing", "pad"]
    code, _, _ = run(capsys, config, *options, "--bench.output", str(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())["result"]["flops"]
    loaded = load_config(config, overrides=[("data.packing", "pad")])
    stage = loaded.stage_list[0]
    with Feed(stage, make_mesh(stage.mesh.shape), loaded.seed) as feed:
        flops = [step_flops(stage, None, stage.model.parameter_count(), feed.next().rows) for _ in range(4)]
    assert code == 0 and flops[:2] != found == flops[1:3] != flops[2:]


def test_random_tokens_stand_in_for_missing_data(capsys, config):
    options = ["--bench.steps", "1", "--bench.warmup", "1"]
    code, out, _ = run(capsys, config, *options, "--data.sources", "[{path: gone.jsonl}]")
    assert code == 0
    assert "random tokens: the config's own data cannot be used (" in out and "random tokens, a document a row" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "takes one CONFIG, not 0: none"),
        (["CONFIG", "--bench.steps", "0"], "steps is 0; it must be at least 1"),
        (["CONFIG", "--bench.step", "1"], "unknown key 'step'; did you mean 'steps'?"),
        (["CONFIG", "--bench.data", "own"], "'own' is not one of 'auto', 'config', 'synthetic'"),
        (["CONFIG", "--bench.stage", "32k"], "--bench.stage: there is no stage '32k'; the stages are train"),
        (["CONFIG", "--training.step", "1"], "unknown key 'training.step'; did you mean 'steps'?"),
        (["CONFIG", "--bench.data", "config", "--data.sources", "[{path: gone.jsonl}]"], "gone.jsonl"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(capsys, config, arguments, message):
    code, _, err = run(capsys, *[config if argument == "CONFIG" else argument for argument in arguments])
    assert code == 2 and message in err and err.count("\n") == 1


def test_help_names_the_options(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"--bench.{option}" in out for option in ("steps", "data", "profile", "output"))


def test_a_step_ends_when_it_ends():
    """Not when the host is back from dispatching the next one: nobody waits here."""

    class Loss:
        def __init__(self):
            self.done = threading.Event()

        def block_until_ready(self):
            assert self.done.wait(30)
            return self

    first, second = Loss(), Loss()
    with train._Ends() as ends:
        ends.watch(first)
        ends.watch(second)
        assert len(ends.times) == 1
        first.done.set()
        ends.wait(0)
        before = time.perf_counter()
        second.done.set()
        while len(ends.times) < 3:
            time.sleep(0.001)
    assert ends.times[1] <= before <= ends.times[2]
