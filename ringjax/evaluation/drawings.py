"""Pictures and clips drawn from held-out captions, and whether a captioner recognises them among ten captions.

    caption -> codes -> pixels -> codes -> the judge's choice         drawn
    picture -> codes -> pixels -> codes -> the judge's choice         real: as good as a drawing can be for this judge

What the judge sees has been a picture in between (`see codes` leaves that out): what counts is what people would see.
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ringjax.evaluation.captions import REAL, real_cell
from ringjax.evaluation.choices import Judge, choice_record, draw_choices
from ringjax.evaluation.eval_progress import EvalProgress
from ringjax.evaluation.heldout import HeldOut, Line
from ringjax.evaluation.question import Cell
from ringjax.evaluation.results import Results
from ringjax.evaluation.vision_config import DrawingOptions, DrawingsConfig
from ringjax.inference.trained import TrainedRun

DRAWN = "drawn"


class Wanted(NamedTuple):
    """One drawing of a caption."""

    line: Line
    real: Int[np.ndarray, "frames codes"]
    number: int
    """Which of the drawings of its caption."""


def run_drawings(
    config: DrawingsConfig, heldout: HeldOut, judge_run: TrainedRun, lines: Sequence[Line],
    codes: Sequence[np.ndarray], results: Results,
) -> None:  # fmt: skip
    """Draws and judges what `results` do not hold yet; a batch of which something is missing is drawn again whole."""
    judge = Judge(judge_run, config.prompt)
    batches = list(_batches(config, lines, codes))
    cells = [cell for batch in batches for wanted in batch for cell in _cells(config, wanted).items()]
    done = sum(results.has(*cell) for cell in cells)
    begun: set[tuple] = set()
    with EvalProgress(config.progress, len(cells), done) as shown:
        for batch in batches:
            missing = [[c for c in _cells(config, w).items() if not results.has(*c)] for w in batch]
            if not any(missing):
                continue
            start = time.perf_counter()
            drawn = draw(heldout.run, config, [(w.line.caption, len(w.real)) for w in batch], config.batch, config.seed)
            seconds = (time.perf_counter() - start) / len(batch)
            for wanted, picture, todo in zip(batch, drawn, missing):
                for method, cell in todo:
                    picked = picture if method == DRAWN else wanted.real
                    choices = draw_choices(heldout, wanted.line, config.choices, config.seed)
                    start = time.perf_counter()
                    verdict = judge(_seen(config, heldout.run, judge_run, picked), choices.captions)
                    spent = time.perf_counter() - start + (seconds if method == DRAWN else 0)
                    compiled = (method, cell.length) not in begun
                    record = choice_record(method, cell, choices, verdict, config.by, spent, compiled)
                    results.add(record | ({"codes": picture.ravel().tolist()} if method == DRAWN else {}))
                    shown.step(f"{method} {cell.part} {cell.index}", "right" if record["score"] else "wrong")
            begun |= {(method, len(batch[0].real)) for method in (DRAWN, REAL)}


def draw(
    run: TrainedRun, options: DrawingOptions, wanted: Sequence[tuple[str, int]], batch: int, seed: int
) -> Int[np.ndarray, "n frames codes"]:
    """Codes for captions that all want the same number of frames, as rows of one batch of `batch` (one program)."""
    frames = wanted[0][1]
    words = [options.asked(caption, frames) for caption, _ in wanted]
    words += words[-1:] * (batch - len(words))
    found = run.draw_clips(words, frames, sampling=options.sampling(seed), later=options.later_sampling(seed))
    return found[: len(wanted)].astype(np.int32)


def require_same_pictures(run: TrainedRun, judge: TrainedRun, see: str) -> None:
    """Raises ValueError for a judge that cannot see what the run draws."""
    own, other = run.vqgan.config, judge.vqgan.config
    if (own.resolution, own.channels) != (other.resolution, other.channels):
        raise ValueError(
            f"the judge's image tokenizer takes pictures of {other.resolution} pixels and {other.channels} channels,"
            f" and those drawn have {own.resolution} and {own.channels}; name a judge for pictures like these"
        )
    from ringjax.models.vqgan import vqgan_fingerprint

    if see == "codes" and vqgan_fingerprint(run.vqgan) != vqgan_fingerprint(judge.vqgan):
        raise ValueError(
            "see 'codes' with a judge of another image tokenizer, for which the same codes are other pictures; use"
            " --see pixels"
        )


def _batches(config: DrawingsConfig, lines: Sequence[Line], codes: Sequence[np.ndarray]) -> Iterator[list[Wanted]]:
    """Drawings that are made together: of as many frames each, in an order that does not depend on what is done."""
    groups: dict[int, list[Wanted]] = {}
    for line, real in zip(lines, codes, strict=True):
        groups.setdefault(len(real), []).extend(Wanted(line, real, n) for n in range(config.per_caption))
    for _, group in sorted(groups.items()):
        for first in range(0, len(group), config.batch):
            yield group[first : first + config.batch]


def _cells(config: DrawingsConfig, wanted: Wanted) -> dict[str, Cell]:
    """What is asked about a drawing: itself, and once a caption the real picture."""
    cell = real_cell(wanted.line, wanted.real)
    drawn = {DRAWN: cell._replace(index=cell.index * config.per_caption + wanted.number)}
    return drawn | ({REAL: cell} if wanted.number == 0 else {})


def _seen(
    config: DrawingsConfig, run: TrainedRun, judge: TrainedRun, codes: Int[np.ndarray, "frames codes"]
) -> Int[np.ndarray, "frames codes"]:
    """What the judge gets."""
    return codes if config.see == "codes" else judge.to_codes(run.to_pictures(codes)).astype(np.int32)
