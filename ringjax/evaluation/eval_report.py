"""An evaluation's report: summary.json, report.md, and one page of HTML with everything in it."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringjax.evaluation.pictures import draw
from ringjax.evaluation.results import Results
from ringjax.evaluation.summary import Record, by_bucket, markdown, summarise, table

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right}"
    "th{background:#f3f3f3}img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto}"
)
_SHOWN = 12


def write_report(results: Results, title: str) -> list[Path]:
    """Everything that people look at, from what has been answered so far. Gives the files."""
    folder, records = results.path.parent, results.records
    pictures = draw(folder, records, title)
    lines = summarise(records)
    found: dict[str, Any] = {"title": title, "asked": results.asked, "table": [line._asdict() for line in lines]}
    if "losses" in records[0]:
        found["loss_by_position"] = _losses(records)
    written = {
        "summary.json": json.dumps(found, indent=1) + "\n",
        "report.md": _markdown(title, markdown(lines), pictures),
        "report.html": _page(title, lines, pictures, records, results.asked),
    }
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [*(folder / name for name in written), *pictures]


def _losses(records: Sequence[Record]) -> list[dict[str, Any]]:
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record["method"], record["length"]), []).append(record)
    return [{"method": m, "length": n, "losses": by_bucket(group)} for (m, n), group in groups.items()]


def _markdown(title: str, found: str, pictures: Sequence[Path]) -> str:
    shown = "\n\n".join(f"![{path.stem}]({path.name})" for path in pictures)
    return f"# {title}\n\n{found}\n\n{shown}\n"


def _page(title: str, lines, pictures: Sequence[Path], records: Sequence[Record], asked: dict[str, Any]) -> str:
    head, rows = table(lines)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        html_table(head, rows),
        *map(html_picture, pictures),
    ]
    missed = [record for record in records if record.get("score", 1) < 1][:_SHOWN]
    if missed:
        shown = [[r["method"], r["part"], str(r["length"]), "-" if r["depth"] is None else f"{r['depth']:g} %",
                  ", ".join(r["answers"]), r["text"][:200]] for r in missed]  # fmt: skip
        parts += ["<h2>Answers that miss something</h2>"]
        parts += [html_table(["method", "task", "length", "depth", "expected", "answer"], shown)]
    parts += ["<h2>What was asked</h2>", f"<pre>{html.escape(json.dumps(asked, indent=1))}</pre></html>\n"]
    return "\n".join(parts)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of words, escaped."""
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{body}</table>"


def html_picture(path: Path) -> str:
    """A picture inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<p><img alt='{path.stem}' src='data:image/png;base64,{data}'></p>"
