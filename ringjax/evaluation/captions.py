"""Held-out pictures and clips put into words: the right caption among ten, by likelihood."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from ringjax.evaluation.choices import Judge, choice_record, draw_choices
from ringjax.evaluation.eval_progress import EvalProgress
from ringjax.evaluation.heldout import HeldOut, Line
from ringjax.evaluation.question import Cell
from ringjax.evaluation.results import Results
from ringjax.evaluation.vision_config import CaptionsConfig

REAL = "real"


def run_captions(
    config: CaptionsConfig, heldout: HeldOut, lines: Sequence[Line], codes: Sequence[np.ndarray], results: Results
) -> None:
    """Asks about every line that `results` do not hold yet."""
    cells = [real_cell(line, frames) for line, frames in zip(lines, codes, strict=True)]
    done = sum(results.has(REAL, cell) for cell in cells)
    judge, seen = Judge(heldout.run, config.prompt), set()
    with EvalProgress(config.progress, len(lines), done) as shown:
        for line, frames, cell in zip(lines, codes, cells, strict=True):
            if results.has(REAL, cell):
                continue
            choices = draw_choices(heldout, line, config.choices, config.seed)
            start = time.perf_counter()
            verdict = judge(frames, choices.captions)
            asked = [config.asked(caption, len(frames)) for caption in choices.captions]
            verdict = dataclasses.replace(verdict, codes=judge.of_codes(frames, asked))
            seconds = time.perf_counter() - start
            # The first of a kind waits for compilation: its time does not count where there are others.
            compiled = (line.kind, len(frames)) not in seen
            seen.add((line.kind, len(frames)))
            record = choice_record(REAL, cell, choices, verdict, config.by, seconds, compiled)
            results.add(record)
            shown.step(f"{line.kind} {line.index}", "right" if record["score"] else "wrong")


def real_cell(line: Line, frames: np.ndarray) -> Cell:
    """Where a held-out line stands in the results; its length is that of the clip in frames."""
    return Cell(line.kind, len(frames), None, line.index)
