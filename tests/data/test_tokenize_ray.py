"""`ringjax tokenize --executor ray`: the bytes of a local run, and what was made before a stop is not made again."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringjax.data import tokenize_ray
from ringjax.data.bundles import Bundle, Line, Part
from ringjax.data.tokenize import _lines, _recipe
from ringjax.data.tokenize_config import TokenizeConfig
from ringjax.data.tokenize_ray import MADE, RayWorker, made_before, resumable_folder
from tests.data.helpers import write_jsonl
from tests.data.test_tokenize import contents, tokenize

RAY = importlib.util.find_spec("ray") is not None
OPTIONS = {"examples_per_shard": 5, "on_error": "skip"}


@pytest.fixture
def inputs(tmp_path):
    """Twenty-three lines, one of them broken, and a document."""
    rows = [{"fields": "text", "text": f"line {i} " * (1 + i % 4)} for i in range(23)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{broken\n")
    (tmp_path / "b.txt").write_text("a document of its own")
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]


def portions_of(config: TokenizeConfig) -> list[tuple[Bundle, ...]]:
    bundles = [Bundle((Part(line),)) for line in _lines(config)[0]]
    return [tuple(bundles[i : i + config.examples_per_shard]) for i in range(0, len(bundles), 5)]


def test_portions_travel_as_text():
    lines = [Line("a b", 3, 9, 0), Line("ü", 0, 7, None)]
    portion = (Bundle((Part(lines[0]), Part(lines[1], 2), Part(lines[0], 1))), Bundle((Part(lines[1]),), needle=0))
    assert tokenize_ray._portion(tokenize_ray._portion_text(portion)) == portion


def test_the_folder_goes_by_what_decides_the_bytes(tmp_path):
    first = resumable_folder(tmp_path / "out", {"a": 1, "b": 2})
    assert first == resumable_folder(tmp_path / "out", {"b": 2, "a": 1})
    assert first != resumable_folder(tmp_path / "out", {"a": 1, "b": 3})
    assert first.parent == tmp_path and first.name.startswith(".out.unfinished-")


@pytest.fixture
def worked(inputs, tmp_path, monkeypatch):
    """What a worker leaves, called here as Ray calls it; and the configs that made it."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # a worker sets it for its process
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.chdir(tmp_path)
    config = TokenizeConfig(tuple(inputs), "x", tokenizer="bytes", **OPTIONS)
    folder = resumable_folder(tmp_path / "out", {})
    recipe, _ = _recipe(config)
    worker = RayWorker(tokenize_ray.dataclasses.replace(recipe, folder=str(folder)), str(tmp_path))
    portions = portions_of(config)
    rows = [
        worker({"number": number, "portion": tokenize_ray._portion_text(portion)})
        for number, portion in enumerate(portions)
    ]
    return folder, rows


def test_a_worker_makes_the_shards_of_a_local_run(worked, inputs, tmp_path):
    folder, rows = worked
    tokenize(inputs, tmp_path / "local", codes_per_frame=256, vision_codes=None, **OPTIONS)
    shards = sorted((tmp_path / "local").glob("*.array_record"))
    assert len(shards) == 5
    assert all((folder / shard.name).read_bytes() == shard.read_bytes() for shard in shards)
    assert all(row["error"] == "" and json.loads(row["result"]) for row in rows)
    assert not list(folder.glob("making/*/*.array_record"))


def test_only_whole_shards_count_as_made(worked):
    folder, rows = worked
    assert sorted(made_before(folder, 5)) == [0, 1, 2, 3, 4]
    assert made_before(folder, 5)[1] == tokenize_ray._result(json.loads(rows[1]["result"]))
    (folder / "00000.array_record").unlink()
    content = bytearray((folder / "00001.array_record").read_bytes())
    content[-1] ^= 1
    (folder / "00001.array_record").write_bytes(content)
    (folder / MADE / "00002.json").write_text('{"shard": ')
    (folder / MADE / "00003.json").write_text('{"shard": null}')
    assert sorted(made_before(folder, 5)) == [4]


def test_a_line_that_cannot_be_used_comes_back_as_words(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(tmp_path)
    config = TokenizeConfig(tuple(inputs[:1]), "x", tokenizer="bytes", examples_per_shard=5)
    folder = resumable_folder(tmp_path / "out", {})
    worker = RayWorker(tokenize_ray.dataclasses.replace(_recipe(config)[0], folder=str(folder)), str(tmp_path))
    row = worker({"number": 4, "portion": tokenize_ray._portion_text(portions_of(config)[4])})
    assert "a.jsonl line 24" in row["error"] and not (folder / MADE / "00004.json").exists()


def test_no_worker_on_ray_is_refused():
    with pytest.raises(ValueError, match="workers 0 works in this process, and executor ray in others"):
        TokenizeConfig(("a.jsonl",), "x", executor="ray", workers=0)


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_extra_is_named(inputs, tmp_path):
    with pytest.raises(ImportError, match=r"pip install 'ringjax\[ray\]'"):
        tokenize(inputs, tmp_path / "out", executor="ray", workers=None)
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


def ringjax(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "ringjax.cli", "tokenize", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not RAY, reason="needs the extra ray")
def test_a_local_cluster_makes_the_same_bytes_and_goes_on_after_a_stop(tmp_path):
    rows = [{"fields": "text", "text": f"line {i} " * 300} for i in range(2000)]
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"fields": "missing"}])
    (tmp_path / "b.txt").write_text("a document of its own")
    asked = ("a.jsonl", "b.txt", "--on_error", "skip", "--examples_per_shard", "10")
    local = ringjax(tmp_path, *asked, "--output", "local", "--workers", "2")
    assert "2001 examples" in local.communicate(timeout=240)[0]
    on_ray = ("--executor", "ray", "--workers", "2", "--output", "made")
    process = ringjax(tmp_path, *asked, *on_ray)
    deadline = time.monotonic() + 400  # on a busy machine it takes minutes until Ray has started
    while len(list(tmp_path.glob(".made.unfinished-*/made/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 130 and not (tmp_path / "made").exists(), printed
    (unfinished,) = tmp_path.glob(".made.unfinished-*")
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.array_record")}
    assert 3 <= len(list((unfinished / MADE).glob("*.json"))) < 201
    process = ringjax(tmp_path, *asked, *on_ray)
    printed = process.communicate(timeout=500)[0]
    assert process.returncode == 0, printed
    assert contents(tmp_path / "made") == contents(tmp_path / "local") and len(contents(tmp_path / "local")) == 203
    noted = [name for name in before if (tmp_path / "made" / name).stat().st_mtime_ns == before[name]]
    assert len(noted) >= 3  # what was made before the stop was not made again
    assert not unfinished.exists()
