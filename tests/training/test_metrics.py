"""metrics.jsonl survives kills, resumes and NaN."""

import json
import math
import resource

import pytest

from ringjax.training.metrics import MetricsWriter, missing_steps, read_metrics, truncate_metrics


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def write(tmp_path, first, last, resumed_at=0):
    writer = MetricsWriter(tmp_path, resumed_at)
    for step in range(first, last + 1):
        writer.write({"step": step, "loss": 1.0 / step})
    writer.close()
    return tmp_path / "metrics.jsonl"


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, 1, 7)
    path = write(tmp_path, 6, 9, resumed_at=5)
    assert steps(path) == list(range(1, 10))


def test_a_cut_last_line_is_dropped(tmp_path):
    path = write(tmp_path, 1, 5)
    path.write_text(path.read_text()[:-9])
    assert steps(path) == [1, 2, 3, 4]
    assert steps(write(tmp_path, 5, 6, resumed_at=4)) == [1, 2, 3, 4, 5, 6]


def test_lines_that_are_there_twice_are_kept_once_and_missing_ones_are_told(tmp_path):
    path = write(tmp_path, 1, 6)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], *lines[1:3], "\0\0", *lines[4:]]))
    writer = MetricsWriter(tmp_path, 6)
    writer.close()
    assert steps(path) == [1, 2, 3, 6]  # the line of 5 was spoiled by what lies before it
    assert missing_steps(writer.history, 6) == [4, 5]


def test_a_disk_that_takes_half_a_line_is_named_and_the_half_is_dropped(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limits[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            writer.write({"step": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()  # and writes nothing once more
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 9
    assert steps(write(tmp_path, 2, 3, resumed_at=1)) == [1, 2, 3]


def test_a_run_from_the_start_forgets_the_old_file(tmp_path):
    write(tmp_path, 1, 5)
    assert steps(write(tmp_path, 1, 2)) == [1, 2]


def test_evaluations_of_the_last_step_are_kept(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 3, "loss": 1.0})
    writer.write({"step": 3, "eval": {"a": {"loss": 2.0}}})
    writer.close()
    resumed = MetricsWriter(tmp_path, 3)
    resumed.close()
    assert len(resumed.history) == 2


def test_values_are_exact_and_nan_is_null(tmp_path):
    value = float.fromhex("0x1.91eb86p+1")
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": value, "text_loss": math.nan, "eval": {"a": {"loss": math.inf}}})
    writer.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["loss"] == value
    assert record["text_loss"] is None and record["eval"]["a"]["loss"] is None


def test_tensorboard_is_optional_and_missing_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'ringjax\[tensorboard\]'"):
        MetricsWriter(tmp_path, tensorboard=True)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write({"step": 1, "stage": "a", "loss": 2.0, "eval": {"s": {"loss": 3.0}}})
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_lines_that_no_run_wrote_are_left_out(tmp_path):
    lines = [
        "[" * 100_000,
        "9" * 5000,
        '{"step": true}',
        '{"step": 1, "loss": NaN, "more": [Infinity]}',
        "null",
        '{"step": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    truncate_metrics(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "more": [null]}\n'
