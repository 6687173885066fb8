"""What people see of choices among captions: a table with intervals, a picture of bars, one page of HTML."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ringjax.evaluation.eval_report import STYLE, html_picture, html_table
from ringjax.evaluation.pictures import new_figure, save_figure
from ringjax.evaluation.results import Results
from ringjax.evaluation.summary import Record

_Z = 1.959964
_SHOWN = 20


class Share(NamedTuple):
    """How many were right, and where the share lies that they come from (95 %)."""

    right: int
    count: int
    low: float
    high: float

    @classmethod
    def of(cls, right: int, count: int) -> "Share":
        """With Wilson's interval (1927), which holds for few and for extreme shares too:

        (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)
        """
        share, square = right / count, _Z**2 / count
        half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count))
        middle, scale = share + square / 2, 1 + square
        return cls(right, count, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))

    def __str__(self) -> str:
        return f"{self.right / self.count:.1%} ({100 * self.low:.1f}–{100 * self.high:.1f})"


class ChoiceLine(NamedTuple):
    """A row of the table."""

    part: str
    method: str
    count: int
    shares: dict[str, Share]
    chance: float
    seconds: float


def choice_lines(records: Sequence[Record]) -> list[ChoiceLine]:
    """A line for each kind and what was shown of it."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["part"], record["method"]), []).append(record)
    lines = []
    for (part, method), group in sorted(groups.items(), key=lambda pair: (pair[0][0] != "pictures", pair[0][1])):
        measures = group[0]["right"]
        shares = {by: Share.of(sum(record["right"][by] for record in group), len(group)) for by in measures}
        warm = [record for record in group if not record["compiled"]] or group
        seconds = sum(record["seconds"] for record in warm) / len(warm)
        chance = sum(1 / len(record["choices"]) for record in group) / len(group)
        lines.append(ChoiceLine(part, method, len(group), shares, chance, seconds))
    return lines


def choice_table(lines: Sequence[ChoiceLine], by: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows; the measure that decides stands first."""
    order = [by, *(name for name in _measures(lines) if name != by)]
    head = ["what", "shown", "questions", *(f"right by {name} (95 %)" for name in order), "chance", "s each"]
    rows = [
        [line.part, line.method, str(line.count), *(str(line.shares[name]) for name in order), f"{line.chance:.0%}",
         f"{line.seconds:.3g}"]
        for line in lines
    ]  # fmt: skip
    return head, rows


def _measures(lines: Sequence[ChoiceLine]) -> list[str]:
    return list(lines[0].shares)


def choice_markdown(lines: Sequence[ChoiceLine], by: str) -> str:
    """The table in Markdown."""
    head, rows = choice_table(lines, by)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def write_choices(results: Results, title: str, by: str) -> list[Path]:
    """The report of what has been answered so far. Gives the files."""
    folder, lines = results.path.parent, choice_lines(results.records)
    picture = draw_choices_picture(folder / "choices.png", lines, title)
    table = [{**line._asdict(), "shares": {name: share._asdict() for name, share in line.shares.items()}}
             for line in lines]  # fmt: skip
    found: dict[str, Any] = {"title": title, "asked": results.asked, "table": table}
    written = {
        "summary.json": json.dumps(found, indent=1) + "\n",
        "report.md": f"# {title}\n\n{choice_markdown(lines, by)}\n\n![choices]({picture.name})\n",
        "report.html": _page(title, lines, by, picture, results),
    }
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [*(folder / name for name in written), picture]


def draw_choices_picture(path: Path, lines: Sequence[ChoiceLine], title: str) -> Path:
    """A group of bars a line, a bar a measure, with its interval, and chance dashed."""
    figure = new_figure(max(4.5, 1.5 + 1.3 * len(lines)), 3.6)
    axes = figure.add_subplot()
    measures = _measures(lines)
    width = 0.8 / len(measures)
    for number, by in enumerate(measures):
        shares = [line.shares[by] for line in lines]
        heights = [share.right / share.count for share in shares]
        # Rounding may put an end of the interval past the share itself.
        below = [max(0.0, height - share.low) for height, share in zip(heights, shares)]
        above = [max(0.0, share.high - height) for height, share in zip(heights, shares)]
        places = [i + (number - (len(measures) - 1) / 2) * width for i in range(len(lines))]
        axes.bar(places, heights, width * 0.92, yerr=[below, above], capsize=3, label=by)
    axes.axhline(lines[0].chance, color="grey", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(lines)), [f"{line.part}\n{line.method} ({line.count})" for line in lines])
    axes.set(ylabel="right caption", ylim=(0, 1.05))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(figure, path, title)


def _page(title: str, lines, by: str, picture: Path, results: Results) -> str:
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        html_table(*choice_table(lines, by)),
        html_picture(picture),
    ]
    wrong = [record for record in results.records if record["score"] < 1][:_SHOWN]
    if wrong:
        rows = [[r["part"], r["method"], str(r["index"]), r["answers"][0], r["text"]] for r in wrong]
        parts += ["<h2>Taken for something else</h2>"]
        parts += [html_table(["what", "shown", "number", "right", f"picked by {by}"], rows)]
    parts += ["<h2>What was asked</h2>", f"<pre>{html.escape(json.dumps(results.asked, indent=1))}</pre></html>\n"]
    return "\n".join(parts)
