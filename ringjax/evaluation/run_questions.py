"""The loop: every question of the grid, to every method, each answer written down before the next."""

from collections.abc import Sequence
from typing import Any

from ringjax.evaluation.eval_progress import EvalProgress
from ringjax.evaluation.methods import Methods
from ringjax.evaluation.question import Cell, Task
from ringjax.evaluation.reading import Reading, peak_bytes
from ringjax.evaluation.results import Results


def check_questions(task: Task, methods: Methods, names: Sequence[str], lengths: Sequence[int]) -> None:
    """Raises ValueError now for what would fail hours later: a context too long, a haystack too short, …"""
    for length in lengths:
        for name in names:
            methods.check(name, length)
        parts = {cell.part: cell for cell in reversed(task.cells(length))}
        for cell in parts.values():
            task.ask(cell)


def run_questions(
    task: Task, methods: Methods, names: Sequence[str], lengths: Sequence[int], results: Results, progress: str
) -> None:
    """Asks what `results` do not hold yet, length by length and method by method."""
    todo = [(length, name, cell) for length in lengths for name in names for cell in task.cells(length)]
    done = sum(results.has(name, cell) for _, name, cell in todo)
    reader, opened = None, None
    with EvalProgress(progress, len(todo), done) as shown:
        for length, name, cell in todo:
            if results.has(name, cell):
                continue
            compiled = opened != (length, name)
            if compiled:
                reader = None  # its cache goes before the next one comes
                reader, opened = methods.open(name, length, task, cell), (length, name)
            record = ask(task, reader, name, cell, compiled)
            results.add(record)
            depth = "" if cell.depth is None else f" {cell.depth:g} %"
            shown.step(f"{name} {cell.part} {length}{depth}", f"score {record['score']:.2f}")


def ask(task: Task, reader, name: str, cell: Cell, compiled: bool) -> dict[str, Any]:
    """A line of the results."""
    question = task.ask(cell)
    if getattr(task, "likelihood", False):
        reading: Reading = reader.force(question, task.expected(question))
        score = float(reading.extra["right"] == 1)
    else:
        reading = reader.read(question, lambda text: task.score(question, text) == 1)
        score = task.score(question, reading.text)
    return {
        "method": name, **cell._asdict(), "score": score, "prompt_tokens": len(question.tokens),
        "tokens": reading.tokens, "answers": list(question.answers), "text": reading.text,
        "first_seconds": round(reading.first_seconds, 4), "seconds": round(reading.seconds, 4),
        "cache_bytes": reading.cache_bytes, "peak_bytes": peak_bytes(), "compiled": compiled, **reading.extra,
    }  # fmt: skip
