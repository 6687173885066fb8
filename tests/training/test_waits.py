"""Who waits for whom: what the records say, and when it is said that the devices wait for data."""

import json
import time

import pytest

from ringjax.training import waits
from ringjax.training.feed import Feed
from ringjax.training.load import parse_config
from ringjax.training.loop import train
from ringjax.training.waits import Waits
from tests.tiny_run import CONFIG


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def steps(found: Waits, clock, count: int, *, data: float, devices: float, other: float) -> list[str | None]:
    said = []
    for _ in range(count):
        for what, seconds in (("data", data), ("devices", devices)):
            with found.on(what):
                clock[0] += seconds
        assert found.step(data + devices + other) == {"data_seconds": pytest.approx(data)}
        said.append(found.complaint())
    return said


def test_it_is_said_once_after_enough_steps(clock):
    said = steps(Waits(), clock, 120, data=0.08, devices=0.001, other=0.02)
    assert [place for place, words in enumerate(said) if words] == [49]
    assert "80 of 101 ms a step" in said[49]


@pytest.mark.parametrize(
    ("data", "devices", "other"),
    [(0.08, 0.02, 0.0), (0.04, 0.0, 0.06)],
    ids=["the devices are waited for too", "the host is busy with something else"],
)
def test_it_is_not_said(clock, data, devices, other):
    assert not any(steps(Waits(), clock, 120, data=data, devices=devices, other=other))


def test_a_step_without_a_time_counts_for_nothing(clock):
    found = Waits()
    with found.on("data"):
        clock[0] += 9.0
    assert found.step(None) == {}
    assert steps(found, clock, 1, data=0.5, devices=0.0, other=0.0) == [None]


def test_a_run_whose_batches_are_slow_says_so(tmp_path, monkeypatch, capsys):
    prepare = Feed.prepare

    def slow(feed):
        if feed._ahead is None:
            time.sleep(0.3)
        prepare(feed)

    monkeypatch.setattr(Feed, "prepare", slow)
    seen, step = [], Waits.step
    monkeypatch.setattr(Waits, "step", lambda found, seconds: seen.append(dict(found._now)) or step(found, seconds))
    for name, value in (("_STEPS", 4), ("_DATA", 0.01), ("_DEVICES", 1.0)):  # busy cores are slow devices
        monkeypatch.setattr(waits, name, value)
    overrides = [("run_dir", str(tmp_path)), ("training.steps", "8"), ("logging.progress", "plain")]
    train(parse_config(CONFIG, overrides=overrides))
    assert capsys.readouterr().out.count("the devices wait for data") == 1
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0.25 < record["data_seconds"] < record["seconds"] for record in records[1:-1] if "seconds" in record)
    assert "data_seconds" not in records[0]
    assert len(seen) == 8 and all(waited["devices"] > 0 for waited in seen)
