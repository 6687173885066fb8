"""Rows as a table for a terminal, as Markdown, and as results.json."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringjax.benchmarks.environment import header
from ringjax.benchmarks.memory import gib
from ringjax.benchmarks.rows import OK, Row

COLUMNS = (
    "mask", "heads", "tokens", "devices", "layout", "strategy", "backend", "pass", "ms (min–max)",
    "TFLOP/s", "%", "exposed", "memory", "check",
)  # fmt: skip
SHARE = "one device's share, transfers left out"


def cells(row: Row) -> list[str]:
    """The columns of a row; one that was not timed says why."""
    heads = f"{row.heads}/{row.kv_heads}"
    where = f"1 of {row.share}, {SHARE}" if row.share else str(row.devices)
    kind = "forward + backward" if row.kind == "both" else "forward"
    what = [row.mask, heads, str(row.length), where, row.layout or "–", row.strategy, chosen(row), kind]
    if row.status != OK:
        return [*what, row.status, "–", "–", "–", gib(row.bytes_needed), _check(row) or row.reason]
    times = row.times
    return [
        *what,
        f"{_ms(times['median'])} ({_ms(times['min'])}–{_ms(times['max'])})",
        f"{row.rate / 1e12:.3g}",
        "–" if row.percent is None else f"{row.percent:.1f}",
        _exposed(row),
        gib(row.bytes_needed),
        _check(row) or "–",
    ]


def line(row: Row) -> str:
    """A row in one line, for those who wait for the table."""
    found = dict(zip(COLUMNS, cells(row)))
    what = " ".join(found[name] for name in ("mask", "heads", "tokens", "strategy", "layout", "backend", "pass"))
    if row.status != OK:
        return f"{what}: {row.status}: {row.reason or found['check']}"
    percent = "" if row.percent is None else f", {row.percent:.1f} % of the one-device kernel"
    return f"{what}: {found['ms (min–max)']} ms, {found['TFLOP/s']} TFLOP/s a device{percent}"


def chosen(row: Row) -> str:
    """The backend, and with auto what it chose."""
    if row.backend != "auto" or not row.choices:
        return row.backend
    names = (name for line in row.choices for name in re.findall(r"'(\w+)'", line.split(" for q")[0]))
    return f"auto: {' + '.join(dict.fromkeys(names))}"


def _ms(seconds: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(seconds * 1e3))) if seconds > 0 else 3
    return f"{seconds * 1e3:.{min(3, digits)}f}"


def _exposed(row: Row) -> str:
    if row.exposed is None:
        return "–"
    percent = row.exposed_percent
    return f"{row.exposed * 1e3:.2f} ms" + ("" if percent is None else f" ({percent:.0f} %)")


def _check(row: Row) -> str:
    """How much of the allowed error the worst result uses up, and which one that is."""
    if not row.errors:
        return ""
    name, (error, bound) = max(row.errors.items(), key=lambda item: item[1][0] / item[1][1])
    return f"{name} {error / bound:.2f}" if error <= bound else f"{name} {error:.1e} > {bound:.1e}"


def print_rows(rows: Sequence[Row], notes: Sequence[str], console=None) -> None:
    """The table on the terminal (or wherever `console` writes)."""
    from rich.console import Console
    from rich.table import Table

    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=200)
    table = Table(*COLUMNS, caption="\n".join(notes), caption_justify="left", show_lines=False)
    for row in rows:
        table.add_row(*cells(row), style=None if row.good else "bold red", end_section=row.kind == "both")
    console.print(table, markup=False)


def markdown(rows: Sequence[Row], notes: Sequence[str], environment: dict[str, Any]) -> str:
    """The table with hardware, versions and command, ready for docs/results/."""
    body = markdown_table(COLUMNS, [cells(row) for row in rows])
    return page("Attention", environment, [*body, "", *(f"- {note}" for note in notes)])


def page(title: str, environment: dict[str, Any], body: Sequence[str]) -> str:
    """A page of docs/results/: the command and what it ran on, then `body`."""
    lines = [f"# {title}", "", f"`{environment['command']}`, {environment['date'][:10]}", ""]
    return "\n".join([*lines, *(f"- {line}" for line in header(environment)), "", *body, ""])


def markdown_table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in body]
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *escaped)]


def notes(rows: Sequence[Row]) -> list[str]:
    """How to read the table, as far as it applies to these rows."""
    found = []
    timed = [row for row in rows if row.status == OK]
    held = [row.baseline for row in timed if row.baseline]
    for name, mask in dict.fromkeys((b["name"], b["mask"]) for b in held):
        lengths = sorted({b["length"] for b in held if (b["name"], b["mask"]) == (name, mask)})
        tokens = ", ".join(map(str, lengths))
        found.append(f"one-device kernel: {name}, {mask}, {tokens} tokens, timed in turn with each row")
    if timed:
        found.insert(0, "TFLOP/s: useful ones a device; %: of the one-device kernel's")
    if any(row.baseline and row.baseline["length"] < row.length for row in timed):
        found.append("longer rows are held against the rate of the longest one-device run")
    if any(row.mask not in ("causal", "full") for row in timed):
        found.append("packed and windowed: visible pairs only, against the one-device kernel's rate on a causal mask")
    if any(row.exposed is not None for row in timed):
        found.append("exposed: with rotations less without them, and in % of what the transfers take alone")
    if any(row.share for row in timed):
        found.append(f"{SHARE}: the slowest of the ring's devices, one after the other on one device")
    if any(row.bytes_needed for row in timed):
        found.append("memory: of one device, as the compiler plans it: arguments, results and what lies between")
    if any(row.errors for row in rows):
        found.append(
            "check: the error nearest to its bound, as a share of it; bounds are 2 × (out), 3 × (gradients) that of the"
            " plain formula in the same type"
        )
    elif timed:
        found.append("not checked (--check false)")
    return found


def write_results(folder: Path, name: str, content: Any) -> Path:
    """`content` (a str, or anything that JSON can hold) to a file, replaced in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(finite(content), indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: these are null."""
    if isinstance(value, dict):
        return {str(key): finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
