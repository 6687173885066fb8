"""Outcomes of a campaign as a Markdown table."""

import collections
import json
import statistics
from pathlib import Path
from typing import Any

from faults.lab import Kind

Key = tuple[str, int, int]


def read(log: Path) -> dict[Key, dict[str, Any]]:
    """The outcomes by kind, number and seed; a last line that was cut is left out."""
    found = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            outcome = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[outcome["kind"], outcome["run"], outcome["seed"]] = outcome
    return found


def table(kinds: list[Kind], outcomes: dict[Key, dict[str, Any]]) -> str:
    """One row a kind, and a last one for all."""
    lines = [
        "| kind | runs | passed | what was done | what happened | what was lost | median s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in kinds:
        some = [outcome for outcome in outcomes.values() if outcome["kind"] == kind.name]
        if some:
            lines.append(_row(kind.name, kind.doing, some))
    every = list(outcomes.values())
    passed = sum(outcome["ok"] for outcome in every)
    lost = "nothing" if all(outcome["lost"] == "nothing" for outcome in every) else "see above"
    minutes = sum(outcome["seconds"] for outcome in every) / 60
    lines.append(f"| all | {len(every)} | {passed} | | | {lost} | {minutes:.0f} min in all |")
    return "\n".join(lines)


def _row(name: str, doing: str, some: list[dict[str, Any]]) -> str:
    happened = collections.Counter(outcome["happened"] for outcome in some if outcome["ok"])
    words = "; ".join(f"{what} ({count})" for what, count in happened.most_common())
    failed = [outcome for outcome in some if not outcome["ok"]]
    if failed:
        words += f"; **FAILED ({len(failed)})**"
    lost = "; ".join(sorted({outcome["lost"] for outcome in some}))
    seconds = statistics.median(outcome["seconds"] for outcome in some)
    return f"| {name} | {len(some)} | {len(some) - len(failed)} | {doing} | {words} | {lost} | {seconds:.1f} |"
