"""Each file of a checkpoint cut, flipped, emptied, lengthened or removed."""

import random
import shutil
from pathlib import Path

from faults.lab import EVERY, HALF, Kind, Lab, Outcome, require, whole
from ringjax.exit_codes import ExitCode

NEWEST, BEFORE = HALF // EVERY * EVERY, HALF // EVERY * EVERY - EVERY
DAMAGES = "cut", "flip", "empty", "lengthen", "remove"


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Do to a file what disks and copies do."""
    content = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
        return
    if how == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        content = content[: rng.randrange(len(content))] if content else content
    elif how == "empty":
        content = bytearray()
    if how == "lengthen" or not content and how == "flip":
        content += rng.randbytes(rng.randint(1, 100))
    path.write_bytes(content)


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def checkpoint_damaged(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    """The runs of a campaign go through all files and all damages in turn: the number of the run chooses."""
    number = int(folder.name.rsplit("_", 1)[1])
    run = lab.copy_half(folder / "run")
    newest = run / "checkpoints" / f"step_{NEWEST:08d}"
    there = files(newest)
    victim, how = there[number // len(DAMAGES) % len(there)], DAMAGES[number % len(DAMAGES)]
    before, name = victim.read_bytes(), victim.relative_to(newest).as_posix()
    damage(victim, how, rng)
    if victim.exists() and victim.read_bytes() == before:
        return Outcome("nothing to damage: the file is empty", name)
    sound = whole(run)
    require(newest.name not in sound, f"{how} of {name} is not noticed")
    ended = lab.require_resumed(run, sound)
    said = f"checkpoint {newest.name}", "falling back to the one before it", f"going on after step {BEFORE} "
    ended.require(0, *said)
    if name != "ringjax.json":
        require(name in ended.printed, f"{name} is not named")
    return Outcome("found by its checksum, the one before it used", f"{how} {name}")


def all_damaged(lab: Lab, rng: random.Random, folder: Path) -> Outcome:
    run = lab.copy_half(folder / "run")
    kept = folder / "kept"
    shutil.copytree(run, kept)
    for checkpoint in sorted((run / "checkpoints").iterdir()):
        damage(rng.choice([path for path in files(checkpoint) if path.stat().st_size]), rng.choice(DAMAGES[:3]), rng)
    metrics = (run / "metrics.jsonl").read_bytes()
    lab.train(run).require(ExitCode.FAILED, "no checkpoint")
    require((run / "metrics.jsonl").read_bytes() == metrics, "metrics.jsonl is not what it was")
    shutil.rmtree(run)
    shutil.copytree(kept, run)
    lab.require_resumed(run)
    return Outcome("refused, nothing changed: exit 1; went on with a copy of them")


KINDS = [
    Kind(
        "checkpoint_damaged", "each file of the newest checkpoint cut, flipped, emptied, lengthened, removed",
        checkpoint_damaged, 100, 5,
    ),
    Kind("all_damaged", "a file of every checkpoint damaged, then all of them put back", all_damaged, 4, 1),
]  # fmt: skip
