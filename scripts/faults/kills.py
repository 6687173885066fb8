"""kill -9, SIGTERM and SIGINT at random instants of everything that takes long."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from faults.lab import (
    STEPS,
    Kind,
    Lab,
    Outcome,
    curve,
    finished,
    main,
    require,
    saving,
    steps_done,
    wait,
)
from faults.lab import whole as whole_checkpoints
from ringjax.exit_codes import ExitCode


def _place(run: Path) -> str:
    if not run.exists():
        return "before the run's folder was there"
    done = steps_done(run)
    return f"after {done} of {STEPS} steps" if done else "before the first step"


def _kill(process: subprocess.Popen) -> bool:
    """Whether it was still running."""
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def kill_training(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    run = folder / "run"
    process = lab.start(*lab.arguments(run), log=folder / "log")
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0.2, 4.0))
    else:
        steps = rng.randint(0, STEPS - 1)
        wait(process, lambda: steps_done(run) >= steps)
        time.sleep(rng.random() * 0.05)
    alive, where = _kill(process), _place(run)
    lab.require_resumed(run)
    return Outcome("killed in training" if alive else "had ended", where)


def kill_save(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    run = folder / "run"
    process = lab.start(*lab.arguments(run, "--checkpoint.every", "1"), log=folder / "log")
    number = rng.randint(1, STEPS - 2)
    checkpoints = run / "checkpoints"
    wait(process, lambda: len(list(checkpoints.glob("step_*"))) >= number, poll=0.0005)
    time.sleep(rng.random() * 0.06)
    _kill(process)
    caught = saving(run)
    before = whole_checkpoints(run)
    lab.require_resumed(run, before)
    return Outcome("killed while a save was half written" if caught else "killed between two saves", _place(run))


def kill_restore(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    run = lab.copy_half(folder / "run")
    before, first = whole_checkpoints(run), (run / "metrics.jsonl").read_bytes()
    process, log = lab.start(*lab.arguments(run), log=folder / "log"), folder / "log"
    if rng.random() < 0.5:
        wait(process, lambda: (run / "metrics.jsonl").read_bytes() != first or b"going on" in log.read_bytes())
        time.sleep(rng.random() * 0.5)
    else:
        time.sleep(rng.uniform(1.0, 4.0))
    _kill(process)
    said = log.read_text()
    where = "after the restore" if "left" in said else "in the restore" if "going on" in said else "before the restore"
    lab.require_resumed(run, before)
    return Outcome(f"killed {where}")


def kill_tokenize(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    output, replaces = folder / "set", rng.random() < 0.5
    if replaces:
        shutil.copytree(lab.data, output)
    more = folder / "more.jsonl"
    more.write_text(lab.text.read_text() * 60)
    command = ["tokenize", str(more), *lab.tokenize_options(output), *(["--overwrite"] if replaces else [])]
    process = lab.start(*command, "--workers", str(rng.randint(1, 2)), log=folder / "log")
    begun = lambda: list(folder.glob(".set.unfinished-*"))  # noqa: E731
    if rng.random() < 0.8:
        wait(process, lambda: bool(begun()))
        time.sleep(rng.random() * 3.0)
    else:
        time.sleep(rng.random() * 1.5)
    alive, working = _kill(process), bool(begun())
    if replaces and alive:
        require(_content(output) == _content(lab.data), "the older data set is not what it was")
    elif alive:
        require(not output.exists(), "something that looks like a data set is there")
    again = command if alive or replaces else [*command, "--overwrite"]
    main(*again, "--workers", "0").require(0)
    twin = lab.folder / "more"
    if not twin.exists():
        made = ["tokenize", str(more), *lab.tokenize_options(folder / "twin"), "--workers", "0"]
        main(*made).require(0)
        (folder / "twin").rename(twin)
    require(_content(output) == _content(twin), "the data set is not the one of an undisturbed run")
    if not alive:
        return Outcome("had ended")
    return Outcome("killed with shards half written" if working else "killed before the first shard")


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill_evaluation(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    output = folder / "eval"
    process = lab.start(*_evaluation(lab, output), log=folder / "log")
    results = output / "results.jsonl"
    lines = lambda: results.read_bytes().count(b"\n") if results.exists() else 0  # noqa: E731
    if rng.random() < 0.8:
        wanted = rng.randint(1, 12)
        wait(process, lambda: lines() >= wanted)
        time.sleep(rng.random() * 0.03)
    else:
        time.sleep(rng.uniform(0.5, 4.0))
    alive, answered = _kill(process), max(0, lines() - 1)
    if rng.random() < 0.3 and answered:  # a cut line, as a machine that lost its power leaves one
        os.truncate(results, results.stat().st_size - rng.randint(2, 40))
    main(*_evaluation(lab, output)).require(0)
    twin = lab.folder / "evaluation"
    if not twin.exists():
        main(*_evaluation(lab, folder / "twin")).require(0)
        (folder / "twin").rename(twin)
    require(_answers(output) == _answers(twin), "answers differ from those of an undisturbed evaluation")
    what = "had ended" if not alive else "killed between answers" if answered else "killed before the first answer"
    return Outcome(what, f"{answered} answers")


def _evaluation(lab: Lab, output: Path) -> list[str]:
    text = lab.folder / "haystack.txt"
    if not text.exists():
        text.write_text(" ".join(json.loads(line)["text"] for line in lab.text.read_text().splitlines()))
    return [
        "eval", "perplexity", str(lab.reference), "--haystack", str(text), "--lengths", "32", "64", "--rows", "6",
        "--output", str(output), "--progress", "none", "--allow_beyond", "true",
    ]  # fmt: skip


def _answers(output: Path) -> list[dict]:
    records = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()][1:]
    keys = [tuple(record[name] for name in ("method", "part", "length", "depth", "index")) for record in records]
    require(len(set(keys)) == len(keys), "a question was answered twice")
    timeless = [{k: v for k, v in r.items() if "seconds" not in k and k != "compiled"} for r in records]
    return sorted(timeless, key=lambda record: (record["length"], record["index"]))


def _signalled(lab: Lab, rng: random.Random, folder: Path, number: signal.Signals) -> Outcome:
    run, log = folder / "run", folder / "log"
    process = lab.start(*lab.arguments(run), log=log)
    early = rng.random() < 0.2
    if early:
        wait(process, run.exists)
    else:
        steps = rng.randint(1, STEPS - 1)
        wait(process, lambda: steps_done(run) >= steps)
        time.sleep(rng.random() * 0.02)
    process.send_signal(number)
    ended = finished(process, log)
    if ended.code == ExitCode.FINISHED:
        lab.require_same(run)
        return Outcome("the last step was done already: exit 0")
    ended.require(ExitCode.PREEMPTED, "the same command")
    done, saved = curve(run), sorted(whole_checkpoints(run))
    if done:
        require(saved[-1:] == [f"step_{done[-1][0]:08d}"], f"step {done[-1][0]} was done and is not saved: {saved}")
    lab.require_resumed(run)
    return Outcome("exit 75, the last step saved" if done else "exit 75 before the first step")


def sigterm(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    return _signalled(lab, rng, folder, signal.SIGTERM)


def sigint(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    return _signalled(lab, rng, folder, signal.SIGINT)


KINDS = [
    Kind("kill_training", "`kill -9` at a random instant of training", kill_training, 24, 1),
    Kind("kill_save", "`kill -9` at a random instant of an asynchronous save", kill_save, 20, 1),
    Kind("kill_restore", "`kill -9` at a random instant of going on from a checkpoint", kill_restore, 14, 1),
    Kind("kill_tokenize", "`kill -9` of `ringjax tokenize`, half of them over an older set", kill_tokenize, 10, 1),
    Kind("kill_evaluation", "`kill -9` of `ringjax eval`, some with a cut last line", kill_evaluation, 6, 0),
    Kind("sigterm", "SIGTERM at a random step", sigterm, 10, 1),
    Kind("sigint", "SIGINT (Ctrl-C) at a random step", sigint, 3, 0),
]
