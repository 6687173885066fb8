"""The tables of `scripts/extend_context.sh`: what each model finds at each length, before and after each stage.

    python scripts/extend_summary.py OUTPUT > OUTPUT/summary.md

Beside them pictures, OUTPUT/digits.png, answers.png and multi.png (depth by length, a map a model) and perplexity.png.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ringjax.evaluation.pictures import draw_heat_map, draw_losses
from ringjax.json_text import parse_json
from ringjax.training.metrics import read_metrics

TITLES = {
    "digits": "One needle: every digit is the likeliest token",
    "answers": "One needle: the number is in the greedy answer",
    "multi": "2 of 4 needles: numbers in the greedy answer",
}


def evaluations(output: Path, task: str) -> Iterator[tuple[str, str, Path]]:
    """Variant, stage and folder of each evaluation of this kind: before training first, then stage by stage."""
    for file in sorted(output.glob(f"*/*{task}/summary.json"), key=_order):
        stage = file.parent.name.removesuffix(task).rstrip("_")
        yield file.parts[-3], stage, file.parent


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def _order(file: Path) -> tuple:
    thousands = re.match(r"[0-9]+", file.parent.name)
    return file.parts[-3] != "before", file.parts[-3], int(thousands[0]) if thousands else 0


def title(variant: str, stage: str, method: str) -> str:
    return f"untrained, {method}" if variant == "before" else f"{variant}, after {stage}"


def rows(output: Path, task: str) -> list[tuple[str, dict]]:
    """(model, {length: score})."""
    found = []
    for variant, stage, folder in evaluations(output, task):
        lines = summary(folder)["table"]
        for method in dict.fromkeys(line["method"] for line in lines):
            scores = {line["length"]: line["score"] for line in lines if line["method"] == method}
            found.append((title(variant, stage, method), scores))
    return found


def needles(output: Path, task: str) -> str:
    found = rows(output, task)
    lengths = sorted({length for _, scores in found for length in scores})
    head = ["model", *map(str, lengths)]
    body = [[name, *(f"{scores[n]:.0%}" if n in scores else "–" for n in lengths)] for name, scores in found]
    return f"## {TITLES[task]}\n\n{table(head, body)}" if found else ""


def perplexity(output: Path) -> str:
    """Loss by position, in eighths of the row."""
    body, length = [], 0
    for variant, stage, folder in evaluations(output, "perplexity"):
        for line in summary(folder)["loss_by_position"]:
            losses, length = line["losses"], line["length"]
            pairs = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2])]
            body.append([title(variant, stage, line["method"]), *(f"{loss:.3f}" for loss in pairs)])
    head = ["model", *(f"to {length * (i + 1) // 8}" for i in range(8))]
    return f"## Loss by position in Emma, nats a token\n\n{table(head, body)}" if body else ""


def table(head: list[str], body: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def trained(output: Path) -> str:
    """What training took, by stage."""
    body = []
    for file in sorted(output.glob("*/run/metrics.jsonl")):
        steps = [record for record in read_metrics(file) if "stage_step" in record]
        for stage in dict.fromkeys(record["stage"] for record in steps):
            all_losses = [record["loss"] for record in steps if record["stage"] == stage]
            some = [record for record in steps if record["stage"] == stage and "tokens_per_second" in record]
            if not some:
                continue
            speeds = sorted(record["tokens_per_second"] for record in some)
            seconds, speed = sum(record["seconds"] for record in some), speeds[len(speeds) // 2]
            used = [record["mfu"] for record in some if record.get("mfu")]
            mfu = f"{100 * sorted(used)[len(used) // 2]:.1f} %" if used else "–"
            losses = " → ".join(f"{sum(part) / len(part):.3f}" for part in (all_losses[:10], all_losses[-10:]))
            row = [f"{file.parts[-3]}, {stage}", str(len(all_losses)), f"{seconds:.0f}", f"{speed:,.0f}", mfu, losses]
            body.append(row)
    head = ["stage", "steps", "seconds", "tokens/s", "MFU", "loss of the first and last ten steps"]
    return f"## Training\n\n{table(head, body)}" if body else ""


def answers(folder: Path) -> Iterator[dict]:
    """The records of an evaluation, without what an answer that is being written has of a line."""
    file = folder / "results.jsonl"
    for line in file.read_text("utf-8").split("\n")[1:] if file.is_file() else ():
        with contextlib.suppress(ValueError):
            yield parse_json(line)


def pictures(output: Path) -> list[Path]:
    """Of each task one, with a map or a line for every model."""
    drawn = []
    for task in [*TITLES, "perplexity"]:
        records = []
        for variant, stage, folder in evaluations(output, task):
            for record in answers(folder):
                records.append({**record, "method": title(variant, stage, record["method"])})
        if records:
            draw = draw_losses if task == "perplexity" else draw_heat_map
            drawn.append(draw(output / f"{task}.png", records, TITLES.get(task, "Loss by position in Emma")))
    return drawn


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    parts = [trained(folder), *(needles(folder, task) for task in TITLES), perplexity(folder)]
    if not any(parts):
        sys.exit(f"{folder} holds no runs and no evaluations; give the OUTPUT of scripts/extend_context.sh")
    print("\n\n".join(part for part in parts if part))
    pictures(folder)
