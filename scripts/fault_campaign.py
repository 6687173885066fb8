"""Faults, tried by the hundred: kills, full disks, lost processes, damaged files, and what is lost (nothing).

python scripts/fault_campaign.py --folder /tmp/faults                    all kinds, about 350 runs
python scripts/fault_campaign.py --folder /tmp/faults --only kill_save --runs 100
python scripts/fault_campaign.py --folder /tmp/faults --short            a few of each kind, for CI
python scripts/fault_campaign.py --folder /tmp/faults --table            the table of what was done so far

A run passes if, after the fault, the same command goes on to the losses, evaluations and parameters of an undisturbed
run, float for float, with each step once in metrics.jsonl, and every checkpoint that was whole is still there. Outcomes
go to FOLDER/outcomes.jsonl; a campaign that was stopped goes on there. The exit code is 1 if any run failed.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

# Before JAX is imported: one CPU device here, and programs that are compiled once for all processes.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.pop("XLA_FLAGS", None)

SIGNALS = "sigterm", "sigint", "disk_slow", "peers_terminated"
"""Kinds whose fault is a signal; any other's is meant for the campaign."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the campaign")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="these kinds alone")
    parser.add_argument("--runs", type=int, help="of each kind, in place of its own number")
    parser.add_argument("--seed", type=int, default=0, help="of all instants and places")
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--table", action="store_true", help="print the table of FOLDER and leave")
    options = parser.parse_args(arguments)
    if options.runs is not None and options.runs < 1:
        parser.error(f"--runs {options.runs} must be at least 1; leave it out for each kind's own number")
    return options


def main() -> int:
    options = parse()
    folder = options.folder.absolute()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "lab" / "compiled")
    root = Path(__file__).absolute().parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, str(root))
    from faults import kinds
    from faults.table import read, table

    chosen = {kind.name: kind for kind in kinds()}
    for name in options.only or []:
        if name not in chosen:
            print(f"--only: kind {name!r} is unknown; use {', '.join(chosen)}", file=sys.stderr)
            return 2
    log = folder / "outcomes.jsonl"
    if options.table:
        print(table(list(chosen.values()), read(log)))
        return 0
    wanted = [kind for kind in chosen.values() if not options.only or kind.name in options.only]
    counts = {kind.name: options.runs or (kind.short if options.short else kind.runs) for kind in wanted}
    plan = [(kind, number) for kind in wanted for number in range(counts[kind.name])]
    plan.sort(key=lambda run: (run[1] + 0.5) / counts[run[0].name])  # a campaign that is stopped has some of each
    campaign(plan, folder, options.seed)
    outcomes = read(log)
    print(table(list(chosen.values()), outcomes))
    bad = [outcome for outcome in outcomes.values() if not outcome["ok"]]
    for outcome in bad:
        print(f"FAILED {outcome['kind']} {outcome['run']}: {outcome['happened']}", file=sys.stderr)
    return 1 if bad else 0


def campaign(plan: list, folder: Path, seed: int) -> None:
    """Do what of the plan was not done; one line of outcomes.jsonl a run."""
    from faults.lab import Lab
    from faults.table import read
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    lab, log = Lab(folder / "lab"), folder / "outcomes.jsonl"
    done = read(log)
    todo = [(kind, number) for kind, number in plan if (kind.name, number, seed) not in done]
    console = Console(file=sys.__stderr__)
    shown = (
        TextColumn("[bold]{task.description:16s}"), BarColumn(bar_width=30), MofNCompleteColumn(),
        TextColumn("[red]{task.fields[failed]} failed"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*shown, console=console) as progress:
        task = progress.add_task("preparing", total=len(plan), completed=len(plan) - len(todo), failed=0)
        begun, failed = time.monotonic(), 0
        lab.prepare()
        console.print(f"prepared in {time.monotonic() - begun:.0f} s, {len(todo)} runs to do")
        with open(log, "a") as file:
            for kind, number in todo:
                progress.update(task, description=kind.name)
                outcome = one(lab, kind, number, seed, folder / "runs")
                failed += not outcome["ok"]
                if not outcome["ok"]:
                    console.print(f"[red]{kind.name} {number}[/]: {outcome['happened']}", highlight=False)
                file.write(json.dumps(outcome) + "\n")
                file.flush()
                progress.update(task, advance=1, failed=failed)


def one(lab, kind, number: int, seed: int, runs: Path) -> dict:
    """One run; its folder stays if it failed."""
    from faults.lab import Failed

    folder = runs / f"{kind.name}_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng, begun = random.Random(f"{seed} {kind.name} {number}"), time.monotonic()
    outcome = {"kind": kind.name, "run": number, "seed": seed}
    try:
        found = kind.run(lab, rng, folder)
        outcome |= {"ok": True, "happened": found.happened, "detail": found.detail, "lost": found.lost}
        shutil.rmtree(folder)
    except (Failed, OSError) as error:
        signalled = "SIGINT at step" in str(error) or "SIGTERM at step" in str(error)
        if signalled and kind.name not in SIGNALS:
            raise KeyboardInterrupt from None  # it was for the campaign, and a run in this process took it
        outcome |= {"ok": False, "happened": f"{type(error).__name__}: {error}", "detail": "", "lost": "see happened"}
    return outcome | {"seconds": round(time.monotonic() - begun, 2)}


if __name__ == "__main__":
    sys.exit(main())
