"""What the quickstart's model has learned, in numbers next to bars:  python -m ringjax.evaluation.quickstart RUN_DIR

    captions    held-out digits put into the right word                     at least 90 %
    drawings    digits drawn from words that a plain classifier recognises  at least 90 %
    prose       loss on a held-out novel                                    below a bigram model's

Writes samples.png and report.md into the run folder, and, without --short, pictures.png and clip.webp by the any-to-any
model of the package, where it came with one. Exit code 1 where a bar is missed; with --short, which looks at
few samples of a model that has hardly been trained, the bars do not count.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ringjax.data import samples
from ringjax.evaluation.digits import Captions, Drawings, caption_digits, draw_digits
from ringjax.evaluation.prose import ProseLoss, prose_loss
from ringjax.evaluation.sample_pictures import draw_sample_pictures
from ringjax.inference.sampling import Sampling
from ringjax.inference.trained import TrainedRun
from ringjax.training.load import load_config

SHARE = 0.9
DRAWING = Sampling(temperature=1.0, guidance=2.0, seed=0)
WRITING = Sampling(temperature=0.7, top_p=0.95, seed=0)


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much is looked at."""

    captions: int | None
    drawings: int
    prose_tokens: int | None


FULL = Amounts(captions=None, drawings=20, prose_tokens=None)
SHORT = Amounts(captions=50, drawings=2, prose_tokens=8192)


class Bar(NamedTuple):
    """A number and what it should reach."""

    name: str
    found: str
    wanted: str
    met: bool


class Findings(NamedTuple):
    """Everything that the report shows."""

    captions: Captions
    drawings: Drawings
    prose: ProseLoss
    beginning: str
    continuation: str
    seconds: float

    @property
    def bars(self) -> list[Bar]:
        """The three numbers next to their bars."""
        captions, drawings, prose = np.mean(self.captions.right), np.mean(self.drawings.right), self.prose
        at_least = f"at least {SHARE:.0%}"
        return [
            Bar("held-out digits put into the right word", _share(self.captions.right), at_least, captions >= SHARE),
            Bar("drawn digits that a classifier recognises", _share(self.drawings.right), at_least, drawings >= SHARE),
            Bar(
                "loss on held-out prose, nats a token",
                f"{prose.model:.3f}",
                f"below {prose.bigram:.3f} (bigram model)",
                prose.model < prose.bigram,
            ),
        ]


def evaluate(run_dir: str | Path, amounts: Amounts = FULL) -> Findings:
    """Look at what a run has learned.

    Raises CheckpointError where the run has no whole checkpoint, ImportError without scikit-learn.
    """
    start = time.monotonic()
    run = TrainedRun.load(run_dir)
    seq_len = load_config(Path(run_dir) / "config.yaml").stage_list[-1].training.seq_len
    beginning = first_line()
    findings = Findings(
        captions=caption_digits(run, count=amounts.captions),
        drawings=draw_digits(run, count=amounts.drawings, sampling=DRAWING),
        prose=prose_loss(run, seq_len=seq_len, max_tokens=amounts.prose_tokens),
        beginning=beginning,
        continuation=run.continue_text([beginning], max_new_tokens=64, sampling=WRITING)[0],
        seconds=0.0,
    )
    return findings._replace(seconds=time.monotonic() - start)


def first_line() -> str:
    """The beginning of the held-out novel: the heading and the first words of its first chapter."""
    heading, text = samples.prose_chapters("heldout")[0].split("\n\n", 1)
    return f"{heading}\n\n{' '.join(text.split()[:12])}"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ringjax.evaluation.quickstart", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run_dir", help="the folder of the quickstart's run")
    parser.add_argument("--short", action="store_true", help="few samples, and bars that do not count")
    arguments = parser.parse_args(argv)
    from ringjax.evaluation.quickstart_report import draw_samples, write_report

    findings = evaluate(arguments.run_dir, SHORT if arguments.short else FULL)
    paths = [draw_samples(arguments.run_dir, findings), write_report(arguments.run_dir, findings, arguments.short)]
    if not arguments.short:
        paths += draw_sample_pictures(arguments.run_dir)
    for bar in findings.bars:
        verdict = "" if arguments.short else " - met" if bar.met else " - MISSED"
        print(f"{bar.name}: {bar.found}; bar: {bar.wanted}{verdict}")
    print(f"\n{findings.beginning}{findings.continuation}\n")
    if arguments.short:
        print("Short form: the model was hardly trained; this shows that everything runs, not what can be learned.")
    for path in (Path(arguments.run_dir) / "loss.png", *paths):
        print(path)
    return 0 if arguments.short or all(bar.met for bar in findings.bars) else 1


def _share(right: np.ndarray) -> str:
    return f"{np.mean(right):.1%} ({np.sum(right)} of {len(right)})"


if __name__ == "__main__":
    sys.exit(main())
