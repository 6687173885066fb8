"""Where faults are tried: a tiny run, its undisturbed twin, and what must be true after a fault.

    lab/config.yaml, text.jsonl, heldout.jsonl, set/    the run and its data, made anew from a seed
        reference/     the run, undisturbed, all checkpoints kept
        half/          the same as a kill after step HALF leaves it
        compiled/      XLA's cache, so that a process starts in seconds
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ringjax import cli
from ringjax.training.checkpoint import FOLDER, step_folders
from ringjax.training.manifest import NAME, DamagedCheckpoint, read_manifest
from ringjax.training.metrics import read_metrics

STEPS, EVERY, EVAL_EVERY, HALF = 24, 3, 6, 13
EVALUATED = list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY))
CONFIG = f"""
model:
  {{width: 16, ffn_width: 32, layers: 1, heads: 2, vocab_size: 512, vision_vocab_size: 0, dtype: float32,
    loss_chunk: 64}}
data: {{sources: [{{path: LAB/set}}], heldout: [{{path: LAB/heldout.jsonl, fields: text}}]}}
training: {{steps: {STEPS}, seq_len: 64, batch_size: 4, eval_every: {EVAL_EVERY}, eval_batches: 1, spike: 1.0}}
optimizer: {{learning_rate: 1.0e-2, warmup_steps: 2}}
mesh: {{shape: "1,1,1,1"}}
checkpoint: {{every: {EVERY}, keep_last: 100}}
logging: {{progress: plain, every: 1, plot: false}}
"""
WORDS = tuple("ring attention reads a long text block by block and no device ever holds it all".split())  # noqa: SIM905


class Failed(AssertionError):
    """A fault did what it must not; the message says what."""


def require(condition: bool, message: str) -> None:
    """Raises Failed with `message` where something that must be true is not."""
    if not condition:
        raise Failed(message)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened in a run of the campaign: a few words that are counted in the table, and what was lost."""

    happened: str
    detail: str = ""
    lost: str = "nothing"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault: `run(lab, rng, folder)` does it once, and raises Failed where something is lost."""

    name: str
    doing: str
    run: Callable[["Lab", random.Random, Path], Outcome]
    runs: int
    short: int
    """How often in the short form."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    printed: str

    def require(self, code: int, *words: str) -> "Ended":
        """Raises Failed where the exit code is another or the words were not printed."""
        require(self.code == code, f"exit code {self.code}, not {code}: {self.printed[-500:]}")
        require("Traceback" not in self.printed, f"a traceback was printed: {self.printed[-500:]}")
        for word in words:
            require(word in self.printed, f"{word!r} was not said: {self.printed[-500:]}")
        return self


class Lab:
    """The folder of a campaign; making it twice makes the same."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reference, self.half = folder / "reference", folder / "half"
        self.config, self.text, self.data = folder / "config.yaml", folder / "text.jsonl", folder / "set"

    def prepare(self) -> None:
        """Make what is missing: data, the undisturbed run, its half."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(CONFIG.replace("LAB", str(self.folder)))
        write_text(self.text, 160, seed=1)
        write_text(self.folder / "heldout.jsonl", 20, seed=2)
        shutil.rmtree(self.data, ignore_errors=True)  # a campaign that was killed may have left it damaged
        main("tokenize", str(self.text), *self.tokenize_options(self.data), "--workers", "0").require(0)
        if not (self.reference / "done").exists():
            shutil.rmtree(self.reference, ignore_errors=True)
            self.train(self.reference).require(0)
            (self.reference / "done").touch()
        if not self.half.exists():
            self.make_half()

    def tokenize_options(self, output: Path) -> list[str]:
        """Of `ringjax tokenize`."""
        names = ["--output", str(output), "--fields", "text", "--examples_per_shard", "40"]
        return [*names, "--progress", "false"]

    def make_half(self) -> None:
        """What a kill after step HALF leaves, its last record cut in the middle."""
        making = self.folder / "half.tmp"
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(self.reference, making, ignore=shutil.ignore_patterns("done"))
        for step, path in step_folders(making / FOLDER):
            if step > HALF:
                shutil.rmtree(path)
        kept = [r for r in read_metrics(making / "metrics.jsonl") if r["step"] <= HALF]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        (making / "metrics.jsonl").write_text(lines[:-20])
        making.rename(self.half)

    # ------------------------------------------------------------------ commands

    def arguments(self, run: Path, *options: str) -> list[str]:
        """Of `ringjax train`."""
        return ["train", str(self.config), "--run_dir", str(run), *options]

    def train(self, run: Path, *options: str) -> Ended:
        """`ringjax train` in this process, which has the programs compiled."""
        return main(*self.arguments(run, *options))

    def start(self, *arguments: str, log: Path, cache: str = "", **environment: str) -> subprocess.Popen:
        """`ringjax …` in a process of its own; it prints into `log`."""
        variables = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(self.folder / f"compiled{cache}"), **environment}
        command = [sys.executable, "-m", "ringjax.cli", *arguments]
        with open(log, "wb") as file:
            return subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)

    def copy_half(self, folder: Path) -> Path:
        """A run that was killed half way."""
        shutil.copytree(self.half, folder)
        return folder

    # ------------------------------------------------------------------ what must be true

    def require_resumed(self, run: Path, before: set[str] | None = None, rtol: float = 0.0, *options: str) -> Ended:
        """Go on with `run`, and require that nothing shows of what happened to it.

        `before`: the whole checkpoints that were there (`whole`); they must be there still.
        """
        before = whole(run) if before is None else before
        ended = self.train(run, *options).require(0)
        gone = before - whole(run)
        require(not gone, f"checkpoints are lost: {', '.join(sorted(gone))}")
        self.require_same(run, rtol)
        return ended

    def require_same(self, run: Path, rtol: float = 0.0) -> None:
        """Every step once, each loss as in the undisturbed run, float for float (or within `rtol`)."""
        found, wanted = curve(run), curve(self.reference)
        steps = [step for step, *_ in found]
        require(steps == [step for step, *_ in wanted], f"metrics have steps {steps}")
        same = np.allclose(found, wanted, rtol=rtol, atol=0)
        first = next((a for a, b in zip(found, wanted) if a != b), None)
        require(same, f"losses differ from the undisturbed run's, first in {first}")
        evaluated = evaluations(run)
        require([step for step, _ in evaluated] == EVALUATED, f"evaluations of steps {[s for s, _ in evaluated]}")
        if not rtol:
            require(evaluated == evaluations(self.reference), "evaluations differ from the undisturbed run's")
            last = f"step_{STEPS:08d}"
            require(parameters(run, last) == parameters(self.reference, last), "the last parameters differ")


def main(*arguments: str) -> Ended:
    """The command line in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = cli.main(list(arguments))
    return Ended(int(code), printed.getvalue())


def write_text(path: Path, lines: int, seed: int) -> None:
    """A jsonl file of random sentences."""
    rng = random.Random(seed)
    rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))} for _ in range(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def steps_done(run: Path) -> int:
    """How many steps a run that is going on has written down."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b'"loss"')
    except FileNotFoundError:
        return 0


def evaluations(run: Path) -> list[tuple[int, dict]]:
    """Step and results of each evaluation."""
    return [(r["step"], r["eval"]) for r in read_metrics(run / "metrics.jsonl") if "eval" in r]


def whole(run: Path) -> set[str]:
    """The checkpoints of a run whose every file fits its checksum."""
    found = set()
    for _, path in step_folders(run / FOLDER):
        with contextlib.suppress(DamagedCheckpoint):
            read_manifest(path)
            found.add(path.name)
    return found


def parameters(run: Path, name: str) -> str:
    """A digest of the numbers of a checkpoint, however its files are arranged."""
    from ringjax.training.arrays import orbax

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shardings are read from the files, which is what is wanted here
        arrays = orbax().load_checkpointables(run.absolute() / FOLDER / name)
    digest = hashlib.sha256()
    for part in ("params", "optimizer"):
        for key, value in sorted(arrays[part].items()):
            digest.update(key.encode() + np.asarray(value).tobytes())
    return digest.hexdigest()


def saving(run: Path) -> bool:
    """Whether a save had begun and was not finished when a process was killed."""
    folder = run / FOLDER
    return any("orbax-checkpoint-tmp" in p.name or not (p / NAME).exists() for p in folder.glob("step_*") if p.is_dir())


def wait(process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 120, poll: float = 0.002) -> None:
    """Until `condition` is true or the process has ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and not condition():
        if time.monotonic() > until:
            process.kill()
            process.wait()
            raise Failed(f"nothing happened within {seconds:.0f} s")
        time.sleep(poll)


def finished(process: subprocess.Popen, log: Path, seconds: float = 120) -> Ended:
    """The end of a process that must end by itself."""
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Failed(f"still running after {seconds:.0f} s: {log.read_text(errors='replace')[-500:]}") from None
    return Ended(code, log.read_text(errors="replace"))
