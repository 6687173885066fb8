"""The command line: exit codes, one-line errors, overrides."""

import sys

import pytest

from ringjax import cli

CONFIG = "model: {size: debug}\ndata: {}\ntraining: {steps: 10}\n"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def run(capsys, *arguments):
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_overview_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)
    assert run(capsys)[0] == 2


def test_version(capsys):
    assert run(capsys, "--version")[1].startswith("ringjax 0.")


def test_split_overrides():
    positional, pairs = cli.split_overrides(
        ["a.yaml", "--training.steps", "10", "--mesh.shape=-1,1,1,8", "--optimizer.b1", "-1", "--plot", "--x-y", "z"]
    )
    assert positional == ["a.yaml"]
    assert pairs == [
        ("training.steps", "10"),
        ("mesh.shape", "-1,1,1,8"),
        ("optimizer.b1", "-1"),
        ("plot", "true"),
        ("x_y", "z"),
    ]


def test_flags_leave_the_next_argument_alone():
    assert cli.split_overrides(["--overwrite", "a.txt"], flags=["overwrite"]) == (["a.txt"], [("overwrite", "true")])
    assert cli.split_overrides(["--overwrite", "false"], flags=["overwrite"]) == ([], [("overwrite", "false")])


def test_config_show_prints_the_resolved_config(capsys, config, tmp_path):
    code, out, err = run(capsys, "config", "show", config, "--training.steps", "3", "--mesh.shape", "-1,1,1,4")
    assert (code, err) == (0, "")
    assert "steps: 3" in out and "width: 256" in out and "shape: -1,1,1,4" in out
    (tmp_path / "again.yaml").write_text(out)
    assert run(capsys, "config", "show", str(tmp_path / "again.yaml"))[1] == out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train"], "takes one CONFIG, not 0: none"),
        (["train", "gone.yaml"], "config gone.yaml does not exist"),
        (["config"], "usage: ringjax config show CONFIG"),
        (["config", "show", "CONFIG", "--training.step", "1"], "unknown key 'training.step'; did you mean 'steps'?"),
        (["train", "CONFIG", "--training.steps", "ten"], "'ten' is not a whole number"),
        (["train", "CONFIG", "--mesh.shape", "1,1,1,9"], "asks for 9 devices"),
        (["info", "x"], "takes no arguments"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(capsys, config, arguments, message):
    code, out, err = run(capsys, *[config if argument == "CONFIG" else argument for argument in arguments])
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1 and err.startswith("ringjax: error: ")


def test_debug_shows_where(capsys):
    code, _, err = run(capsys, "train", "gone.yaml", "--debug")
    assert code == 2 and "Traceback" in err


def test_help_shows_the_values_of_the_config(capsys, config):
    code, out, _ = run(capsys, "train", config, "--help")
    assert code == 0
    assert "--training.steps" in out and "10" in out and "--mesh.shape" in out and "--optimizer.learning_rate" in out
    assert run(capsys, "train", "--help")[0] == 0


def test_tokenize_makes_a_data_set(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("Some words. " * 20)
    options = ["--output", str(tmp_path / "set"), "--workers", "0", "--overwrite"]
    code, out, err = run(capsys, "tokenize", *options, str(tmp_path / "a.txt"))
    assert (code, err) == (0, "") and "1 examples" in out
    code, out, err = run(capsys, "tokenize", str(tmp_path / "a.txt"), "--outptu", "x")
    assert code == 2 and "unknown key 'outptu'; did you mean 'output'?" in err
    code, out, err = run(capsys, "tokenize", str(tmp_path / "gone.txt"), "--output", str(tmp_path / "other"))
    assert code == 1 and "gone.txt" in err and err.count("\n") == 1
    assert "--output" in run(capsys, "tokenize", "--help")[1]


def test_tokenize_takes_several_specs_and_inputs(capsys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"caption": "a, b", "vision": [1, 2]}\n' * 20)
    inputs = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    specs = ["[vision],caption", '["Draw, please:"+caption],vision']
    options = ["--output", str(tmp_path / "set"), "--codes-per-frame", "2", "--vision_codes=8", "--workers", "0"]
    for arguments in ([*inputs, "--fields", *specs], ["--fields", *specs, "--inputs", *inputs]):
        code, out, err = run(capsys, "tokenize", *arguments, *options, "--overwrite")
        assert (code, err) == (0, "") and "40 examples" in out
    from ringjax.data.records import RecordReader

    assert RecordReader(tmp_path / "set").meta["fields"] == specs
    assert len({len(RecordReader(tmp_path / "set")[i]) for i in range(40)}) == 2


def test_info_names_devices_and_backends(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "8 × cpu" in out and "xla" in out and "available" in out and "jax 0." in out


@pytest.mark.parametrize(
    "error, code, message",
    [
        (RuntimeError("the disk is full"), 1, "the disk is full"),
        (NotImplementedError("cannot serve"), 2, "cannot serve"),
        (KeyError("x"), 1, "KeyError: 'x' (--debug shows where)"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, message):
    def fail(_):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(fail, "", ""))
    found, _, err = run(capsys, "train")
    assert (found, err) == (code, f"ringjax: error: {message}\n")


def test_preemption_has_its_own_code(capsys, monkeypatch):
    from ringjax.training.stops import Preempted

    def stop(_):
        raise Preempted("saved")

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(stop, "", ""))
    assert run(capsys, "train")[0] == 75


def test_importing_the_package_is_light():
    """`import ringjax` must not load what only training needs."""
    import subprocess

    heavy = "('orbax', 'grain', 'matplotlib', 'tyro', 'flax')"
    code = f"import sys, ringjax, ringjax.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
