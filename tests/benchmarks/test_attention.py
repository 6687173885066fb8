"""`ringjax bench attention`: what it prints and writes, what it refuses, and that it catches what is wrong."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from ringjax import cli
from ringjax.attention import kernels
from ringjax.benchmarks import attention, table
from ringjax.benchmarks.config import AttentionBench, split_heads
from ringjax.benchmarks.rows import OK, REFUSED, WRONG, Row

SMALL = ["--heads", "4/2", "--head_dim", "8", "--repeats", "2", "--warmup", "1", "--mean_document", "60"]


def run(capsys, *arguments):
    code = cli.main(["bench", "attention", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run over a ring of two: (exit code, folder)."""
    folder = tmp_path_factory.mktemp("bench") / "results"
    options = ["--devices", "2", "--lengths", "128", "130", "--masks", "causal", "packed", "--layouts", "zigzag"]
    code = cli.main(["bench", "attention", *SMALL, *options, "--passes", "both", "--output", str(folder)])
    return code, folder


def test_json_holds_rows_raw_times_and_the_environment(results):
    code, folder = results
    found = json.loads((folder / "results.json").read_text())
    assert code == 0
    about = found["environment"]
    assert about["command"].startswith("ringjax bench attention --heads 4/2 --head_dim 8")
    assert about["device"] == "cpu" and "jax" in about["versions"] and about["python"] and about["date"]
    rows = found["rows"]
    assert [(r["mask"], r["length"], r["strategy"]) for r in rows] == [
        (mask, length, strategy)
        for mask in ("causal", "packed")
        for length in (128, 130)
        for strategy in ("one_device", "ring")
    ]
    ring = rows[1]
    assert ring["status"] == OK and ring["devices"] == 2 and ring["layout"] == "zigzag"
    assert ring["pairs"] == 128 * 129 // 2 and ring["flops"] == 3.5 * 4 * ring["pairs"] * 4 * 8
    assert len(ring["times"]["seconds"]) == len(ring["baseline"]["seconds"]) == 2
    assert ring["rate"] == pytest.approx(ring["flops"] / 2 / ring["times"]["median"])
    assert ring["percent"] == pytest.approx(100 * ring["rate"] / ring["baseline"]["rate"])
    assert ring["exposed"] == pytest.approx(ring["times"]["median"] - ring["still"]["median"])
    assert set(ring["errors"]) == {"out", "dq", "dk", "dv"}
    assert all(error <= bound for error, bound in ring["errors"].values())
    assert ring["memory"]["temporary"] > 0 and ring["compile_seconds"] > 0
    assert "'xla'" in ring["choices"][0]
    assert rows[0]["still"] is None and rows[5]["pairs"] < ring["pairs"]


def test_a_length_that_a_layout_cannot_cut_is_a_row(results):
    rows = json.loads((results[1] / "results.json").read_text())["rows"]
    refused = [row for row in rows if row["status"] == REFUSED]
    assert [(row["length"], row["strategy"]) for row in refused] == [(130, "ring")] * 2
    assert all("cannot be cut into 2·sp = 4 chunks" in row["reason"] and row["times"] is None for row in refused)


def test_markdown_and_plot(results):
    text = (results[1] / "results.md").read_text()
    assert text.startswith("# Attention\n\n`ringjax bench attention") and "× cpu" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 8 and len({line.count("|") for line in lines}) == 1
    assert "one-device kernel: rj.attention xla, causal, 128, 130 tokens" in text and "say nothing about" in text
    picture = matplotlib.image.imread(results[1] / "plot.png")
    assert picture.shape[0] > 300 and np.ptp(picture[..., :3]) > 0.5


@pytest.mark.parametrize("share", [False, True])
def test_a_wrong_kernel_is_caught_and_not_timed(capsys, monkeypatch, share):
    right = kernels.KERNELS["xla"]

    def forward(q, k, v, lo, hi, score):
        return right.forward(q, k, v, lo, hi - (lo < hi) * (hi == q.shape[1]), score)  # the last query misses a key

    monkeypatch.setitem(kernels.KERNELS, "xla", dataclasses.replace(right, forward=forward))
    ring = ["--share", "2"] if share else ["--devices", "2"]
    options = ["--lengths", "256", "--layouts", "contiguous", "--strategies", "ring", "--dtype", "float32"]
    code, out, _ = run(capsys, *SMALL, *ring, *options, "--passes", "forward")
    assert code == 1
    assert "WRONG" in out and "TFLOP/s a device" not in out


def test_shares_are_checked_timed_and_labelled(capsys, tmp_path):
    options = ["--share", "4", "--ranks", "0", "3", "--lengths", "256", "--layouts", "striped", "--passes", "both"]
    code, out, _ = run(capsys, *SMALL, *options, "--output", str(tmp_path))
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert code == 0 and row["status"] == OK
    assert row["share"] == 4 and row["devices"] == 1 and set(row["ranks"]) == {"0", "3"}
    assert set(row["errors"]) == {"out", "dq", "dk", "dv"}
    assert row["times"]["median"] == max(rank["median"] for rank in row["ranks"].values())
    assert row["rate"] == pytest.approx(row["flops"] / 4 / row["times"]["median"])
    label = "one device's share, transfers left out"
    assert label in " ".join(out.split()) and label in (tmp_path / "results.md").read_text()


def test_a_ring_of_hosts(capsys, tmp_path):
    """Right, timed, and another program than the plain ring's: the K and V of a device go two ways."""
    options = ["--lengths", "128", "--layouts", "striped", "--passes", "both", "--devices", "4", "--host_size", "2"]
    strategies = ["--strategies", "two_level", "hybrid", "ring"]
    code, _, _ = run(capsys, *SMALL, "--heads", "4/2", *options, *strategies, "--output", str(tmp_path))
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert code == 0 and [(row["strategy"], row["status"]) for row in rows] == [
        ("two_level", OK), ("hybrid", OK), ("ring", OK)
    ]  # fmt: skip
    assert rows[0]["memory"] != rows[2]["memory"] and rows[0]["still"] is None


@pytest.mark.parametrize("options, message", [
    (["--host_size", "2"], "host_size 2 is for strategies two_level and hybrid; name one, or leave it out"),
    (["--strategies", "hybrid", "--host_size", "2", "--ulysses_size", "2"], "host_size 2 is for strategies two_level"),
    (["--strategies", "two_level", "--ulysses_size", "2"], "ulysses_size 2 is for strategy hybrid; name it"),
    (["--strategies", "two_level", "--host_size", "0"], "host_size 0 must be a number of devices, at least 1"),
])  # fmt: skip
def test_groups_that_nothing_makes_are_refused(capsys, options, message):
    code, _, err = run(capsys, *SMALL, *options)
    assert code == 2 and message in err


def test_other_strategies_and_refusals_are_rows(capsys, tmp_path):
    options = ["--lengths", "128", "--masks", "full", "--layouts", "striped", "--passes", "forward"]
    strategies = ["--devices", "4", "--strategies", "ulysses", "all_gather"]
    code, _, _ = run(capsys, *SMALL, "--heads", "6/3", *options, *strategies, "--output", str(tmp_path))
    ulysses, gather = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert code == 0
    assert ulysses["status"] == REFUSED and "cannot split 6 query and 3 key/value heads" in ulysses["reason"]
    assert gather["status"] == OK and gather["exposed"] is None


def test_a_failure_is_a_row_and_the_exit_code(capsys, monkeypatch):
    def forward(*_):
        raise TypeError("no such thing")

    broken = dataclasses.replace(kernels.KERNELS["xla"], forward=forward)
    monkeypatch.setitem(kernels.KERNELS, "xla", broken)
    options = ["--lengths", "64", "--strategies", "one_device", "--passes", "forward", "--backends", "xla", "reference"]
    code, out, _ = run(capsys, *SMALL, *options, "--check", "false")
    assert code == 1
    assert "failed: TypeError: no such thing" in out


def test_ways():
    config = AttentionBench(layouts=("striped", "zigzag"), backends=("auto", "xla"))
    assert [(way.strategy, way.layout, way.backend) for way in attention.ways(config, 4)] == [
        ("one_device", None, "auto"),
        ("one_device", None, "xla"),
        ("ring", "striped", "auto"),
        ("ring", "zigzag", "auto"),
        ("ring", "striped", "xla"),
        ("ring", "zigzag", "xla"),
    ]
    assert [way.strategy for way in attention.ways(config, 1)] == ["one_device"] * 2


def test_a_row_in_words():
    times = dict(median=0.01, min=0.009, max=0.012)
    row = Row(
        "causal", 8192, 32, 8, 128, 1, "bfloat16", "both", "ring", "striped", "auto", 4, rate=450e12, times=times,
        baseline={"rate": 500e12}, still=dict(median=0.0095), transfers=dict(median=0.002),
        errors={"out": (1e-3, 4e-3), "dk": (3e-3, 6e-3)}, memory=dict(arguments=2**30, results=0, temporary=2**29),
        choices=("attention backend 'cudnn' for full and causal hops, 'mosaic' for q (1,), k (1,), bf16 (not 'x')",),
    )  # fmt: skip
    found = dict(zip(table.COLUMNS, table.cells(row)))
    assert found["ms (min–max)"] == "10.0 (9.00–12.0)" and found["TFLOP/s"] == "450" and found["%"] == "90.0"
    assert found["exposed"] == "0.50 ms (25 %)" and found["memory"] == "1.50 GiB" and found["check"] == "dk 0.50"
    assert found["backend"] == "auto: cudnn + mosaic"
    row.status = WRONG
    assert not row.good and table.cells(row)[8] == WRONG


def test_heads():
    assert split_heads("32/8") == (32, 8) and split_heads("16") == (16, 16)
    with pytest.raises(ValueError, match="5 key/value heads do not divide 32"):
        split_heads("32/5")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--masks", "causal", "windw:8"], "unknown mask 'windw:8'; the masks are causal, full, packed and window:W"),
        (["--heads", "32x8"], "heads '32x8' must be query heads / key and value heads, such as 32/8"),
        (["--backends", "cuda"], "unknown backend 'cuda'"),
        (["--layouts", "stripy"], "'stripy' is not one of 'striped'"),
        (["--lengths", "long"], "'long' is not a whole number"),
        (["--repeats", "0"], "repeats is 0; it must be at least 1"),
        (["--repeats", "1", "2"], "--repeats takes one value, not 2: 1 2"),
        (["--profile", "--repeats", "1"], "--profile takes a value, and there is none behind it"),
        (["--share", "4", "--ranks", "4"], "ranks has 4; a ring of 4 has 0 to 3"),
        (["--ranks", "1"], "ranks (1,) are of a share; give --share too"),
        (["--lenghts", "8"], "unknown key 'lenghts'; did you mean 'lengths'?"),
        (["8192"], "takes only --options, not 8192"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_too_few_devices_is_one_line(capsys):
    code, _, err = run(capsys, "--devices", "64")
    assert code == 1 and "devices is 64 and there are 8" in err and err.count("\n") == 1


def test_help_names_the_options(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"--{field.name}" in out for field in dataclasses.fields(AttentionBench))
    assert cli.main(["bench", "--help"]) == 0 and cli.main(["bench"]) == 2
    capsys.readouterr()
    assert cli.main(["bench", "atention"]) == 2
    assert "did you mean 'attention'?" in capsys.readouterr().err
