"""Fuzzing in processes of their own, so that one that is killed, hangs or crashes is a finding and not the end.

    run(target, …)        starts workers one after the other until enough inputs were read
    python -m tests.fuzz.worker TARGET SEED FIRST LAST SEEDS FINDINGS      is one of them

Input number i of a seed is the same whoever makes it.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
_EACH = 4000
"""Inputs that one process reads, at most."""
CANARY = "CANARY"
"""A file that payloads make where they are run."""


@dataclasses.dataclass
class Outcome:
    """What became of the inputs of a target."""

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    examples: dict = dataclasses.field(default_factory=dict)

    @property
    def line(self) -> str:
        """One line for people."""
        found = "none" if not self.findings else f"{sum(self.findings.values())} of {len(self.findings)} kinds"
        return (
            f"{self.target}: {self.inputs} inputs in {self.seconds:.0f} s, {self.accepted} accepted,"
            f" {self.refused} refused, findings: {found}"
        )


def run(
    target: str,
    *,
    inputs: int,
    seed: int = 0,
    seconds: float = float("inf"),
    findings: Path | None = None,
    first: int = 0,
    most: int = 25,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Read so many inputs of a target, or for so long; stops early at `most` kinds of findings."""
    outcome, start = Outcome(target), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ringjax-fuzz-") as folder:
        places = Path(folder, "seeds"), findings or Path(folder, "findings")
        at = first
        while at < first + inputs and time.monotonic() - start < seconds and len(outcome.findings) < most:
            last = min(first + inputs, at + _EACH)
            at = _run_one(outcome, target, seed, at, last, places, Path(folder), start + seconds, say)
            outcome.seconds = time.monotonic() - start
    outcome.seconds = time.monotonic() - start
    return outcome


def _run_one(
    outcome: Outcome, target: str, seed: int, first: int, last: int, places, folder: Path, end: float, say
) -> int:
    """Lets one process read inputs from `first` on; gives the number of the next one."""
    progress, errors = folder / "progress", folder / "stderr"
    progress.write_text("")
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.worker",
        target,
        str(seed),
        str(first),
        str(last),
        *map(str, places),
        str(folder),
    ]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(root)}
    next_one = first
    with open(errors, "wb") as stderr:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            for line in process.stdout:
                parts = line.rstrip("\n").split("\t")
                if len(parts) != 3 or not parts[0].isdigit():
                    continue
                next_one = int(parts[0]) + 1
                _count(outcome, parts[1], parts[2], next_one - 1, say)
                if time.monotonic() > end:
                    break
        finally:
            if time.monotonic() > end:
                process.kill()
            process.stdout.close()
            code = process.wait()
    if time.monotonic() > end or code == 0:
        return next_one
    told = errors.read_text(errors="replace")
    reached = progress.read_text()
    if not reached:
        raise RuntimeError(f"the worker of {target} did not start:\n{told[-3000:]}")
    died = int(reached.split()[0])
    how = signal.Signals(-code).name if code < 0 else f"exit {code}"
    hangs = "Timeout (" in told
    place = next((part for part in told.splitlines() if f"{os.sep}ringjax{os.sep}" in part and "tests" not in part), "")
    _count(outcome, "hang" if hangs else "crash", f"{how} {place.strip()[-120:]}", died, say)
    _keep(target, seed, died, places, f"{how}\n{told[-5000:]}")
    return died + 1


def _count(outcome: Outcome, kind: str, signature: str, number: int, say) -> None:
    outcome.inputs += 1
    if kind in ("accepted", "refused"):
        setattr(outcome, kind, getattr(outcome, kind) + 1)
        return
    name = f"{kind}: {signature}"
    if name not in outcome.findings:
        outcome.examples[name] = number
        say(f"{outcome.target} input {number}: {name}")
    outcome.findings[name] += 1


# --- in the worker --------------------------------------------------------------------------------------------------


def cases_of(target, folder: Path) -> list:
    """The seeds of a target, made once and kept in `folder`."""
    from tests.fuzz.seeds import files_of

    kept = folder / target.name
    if not kept.is_dir():
        unfinished = folder / f".{target.name}"
        for number, case in enumerate(target.seeds()):
            write_case(unfinished / f"{number:03d}", case)
        unfinished.rename(kept)
    return [files_of(one) for one in sorted(kept.iterdir())]


def write_case(folder: Path, case: dict[str, bytes]) -> None:
    for name, content in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def input_number(target, cases: list, seed: int, number: int) -> dict[str, bytes]:
    """The files of one input: a seed as it is first, then changed ones."""
    from tests.fuzz.targets import change

    if number < len(cases):
        return cases[number]
    rng = random.Random(f"{target.name} {seed} {number}")
    chosen = rng.choice(cases)
    try:
        return change(target, rng, chosen, cases)
    except (MemoryError, RecursionError):  # the changes themselves went too far
        return chosen


def _keep(target_name: str, seed: int, number: int, places, details: str) -> None:
    """Writes an input that is a finding beside what became of it."""
    from tests.fuzz.targets import find, learn_words

    target = find(target_name)
    cases = cases_of(target, places[0])
    learn_words(target, cases)
    place = Path(places[1]) / target_name / str(number)
    write_case(place / "case", input_number(target, cases, seed, number))
    (place / "verdict.txt").write_text(details)


def judge(guard, target, cases: list, seed: int, number: int, work: Path):
    """The verdict on one input, read in a folder of its own below `work`."""
    from tests.fuzz.guard import PATIENCE, SECONDS

    case = work / f"{target.name}-{number}"
    write_case(case, input_number(target, cases, seed, number))
    # What the alarm cannot stop, such as a wait in a library, ends this process.
    faulthandler.dump_traceback_later(PATIENCE * SECONDS, exit=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        verdict = guard.run(target.read, case, target.errors, _names(target, case, cases))
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(case, ignore_errors=True)
    (work / CANARY).unlink(missing_ok=True)
    return verdict


def warmed(target, folder: Path, work: Path) -> list:
    """The seeds of a target, after the first of them was read: libraries are loaded before memory is watched."""
    from tests.fuzz.targets import learn_words

    cases = cases_of(target, folder)
    learn_words(target, cases)
    with contextlib.suppress(Exception):
        write_case(work / f"{target.name}-warm", cases[0])
        target.read(work / f"{target.name}-warm")
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("target", "seed", "first", "last", "seeds", "findings", "folder"):
        parser.add_argument(name)
    given = parser.parse_args()
    from tests.fuzz.guard import MEMORY, Guard, settle
    from tests.fuzz.targets import find

    target, seed = find(given.target), int(given.seed)
    places = Path(given.seeds), Path(given.findings)
    work = Path(given.folder, f"work-{os.getpid()}")
    work.mkdir()
    os.chdir(work)
    guard, seen = Guard(work), collections.Counter()
    cases = warmed(target, places[0], work)
    guard.limit_addresses()
    progress = os.open(Path(given.folder) / "progress", os.O_WRONLY)
    for number in range(int(given.first), int(given.last)):
        os.pwrite(progress, f"{number:<12d}".encode(), 0)
        verdict = judge(guard, target, cases, seed, number, work)
        print(f"{number}\t{verdict.kind}\t{verdict.signature.replace(chr(9), ' ')[:200]}", flush=True)
        name = f"{verdict.kind} {verdict.signature}"
        if not verdict.passed and seen[name] < 2:
            seen[name] += 1
            _keep(target.name, seed, number, places, f"{name}\n{verdict.details}")
        if number % 64 == 0:
            settle()
            _clear_caches(number)
        if verdict.kind == "memory" or _resident() > 3 * MEMORY:
            sys.exit(0)  # another process goes on


def _names(target, case: Path, cases: list) -> tuple[str, ...]:
    """What a message may name: the folder, or a file."""
    files = {name.rsplit("/", 1)[-1] for one in cases for name in one}
    return (
        str(case),
        *target.names,
        *files,
        f"{case.name} ",  # as a checkpoint's folder is called in messages
    )


def _clear_caches(number: int) -> None:
    if number % 1024 == 0 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
