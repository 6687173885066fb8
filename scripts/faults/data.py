"""Data that is missing, changed between two runs, or garbled; and metrics that were cut."""

import json
import random
import shutil
from pathlib import Path

from faults.checkpoints import damage
from faults.lab import Kind, Lab, Outcome, main, require
from ringjax.exit_codes import ExitCode


def _kept(lab: Lab, folder: Path) -> Path:
    """A copy of the data, to put back: what is damaged must lie where the run's config says."""
    return Path(shutil.copytree(lab.data, folder / "kept"))


def _put_back(lab: Lab, kept: Path) -> None:
    shutil.rmtree(lab.data, ignore_errors=True)
    shutil.copytree(kept, lab.data)


def shard(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """A file of the data set is damaged between two runs."""
    run = lab.copy_half(folder / "run")
    kept = _kept(lab, folder)
    victim = rng.choice(sorted(lab.data.iterdir()))
    how = rng.choice(["remove", "cut", "flip", "flip", "flip", "lengthen"])
    try:
        damage(victim, how, rng)
        ended = lab.train(run)
        if ended.code == ExitCode.FINISHED:
            require(how == "flip", f"{how} of {victim.name} is not noticed")
            lab.require_same(run)
            return Outcome("the flipped byte is of no record that was read: same losses", victim.name)
        named = str(victim) if how != "remove" or victim.name != "meta.json" else str(lab.data)
        meta = victim.name == "meta.json" and how in ("flip", "lengthen")
        ended.require(ended.code, *([] if meta else [named]))
        require(ended.code == ExitCode.DATA or meta and ended.code == ExitCode.REFUSED, f"exit code {ended.code}")
    finally:
        _put_back(lab, kept)
    lab.require_resumed(run)
    what = {"remove": "missing", "cut": "cut", "flip": "garbled", "lengthen": "too long"}[how]
    detail = f"{victim.name}: {ended.printed.splitlines()[-1][:150]}"
    return Outcome(f"{what}: exit {ended.code}, the file named", detail)


def changed(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """Another data set lies at the place of the run's: the fingerprint differs."""
    run = lab.copy_half(folder / "run")
    kept = _kept(lab, folder)
    try:
        lines = [json.loads(line) for line in lab.text.read_text().splitlines()]
        how = rng.choice(["a line more", "a line less", "a word changed", "two lines in another order"])
        where = rng.randrange(len(lines) - 1)
        if how == "a line more":
            lines.insert(where, {"text": "one more"})
        elif how == "a line less":
            del lines[where]
        elif how == "a word changed":
            lines[where] = {"text": "changed " + lines[where]["text"]}
        else:
            lines[where], lines[where + 1] = lines[where + 1], lines[where]
        other = folder / "text.jsonl"
        other.write_text("".join(json.dumps(line) + "\n" for line in lines))
        shutil.rmtree(lab.data)
        main("tokenize", str(other), *lab.tokenize_options(lab.data), "--workers", "0").require(0)
        lab.train(run).require(ExitCode.DATA, "the data is not what it was", str(lab.data))
    finally:
        _put_back(lab, kept)
    lab.require_resumed(run)
    return Outcome("refused by its fingerprint: exit 65", how)


def metrics(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """What kills, copies and editors do to metrics.jsonl behind the last checkpoint."""
    run = lab.copy_half(folder / "run")
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    how = rng.choice(["cut line", "lines twice", "garbage at the end", "zeros at the end", "an older temporary file"])
    if how == "cut line":
        lines[-1] = lines[-1][: rng.randrange(len(lines[-1]))]
    elif how == "lines twice":
        where = rng.randrange(len(lines) - 2)
        lines[where:where] = lines[max(0, where - 3) : where + 1]
    elif how == "garbage at the end":
        lines.append(rng.randbytes(rng.randint(1, 300)))
    elif how == "zeros at the end":  # what some file systems leave after a power cut
        lines.append(bytes(rng.randint(1, 4096)))
    else:
        (run / "metrics.tmp").write_text('{"step": 1, "loss": 0}\n')
    path.write_bytes(b"".join(lines))
    lab.require_resumed(run)
    return Outcome("each step once", how)


KINDS = [
    Kind("shard", "a file of the data set missing, cut, garbled or too long", shard, 36, 2),
    Kind("data_changed", "another data set at the same place", changed, 8, 1),
    Kind("metrics", "metrics.jsonl with cut, doubled or garbage lines", metrics, 15, 1),
]
