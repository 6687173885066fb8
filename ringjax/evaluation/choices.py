"""One caption among ten: which stand beside the right one, and which of them a model finds likeliest.

    sum     log p(caption and its end | picture): the likelihood itself
    mean    that per token: a long caption is not unlikely because it is long
    lift    less log p(caption and its end) without the picture: what the picture has said for it
    codes   log p(picture | caption), of its codes: by Bayes' theorem that of the caption, each being as likely as
            another (a generative model as a classifier: Li et al. 2023, arXiv:2303.16203)

The first three are the captioner's, the last is asked of what draws. The other captions are of the held-out set and the
same kind, all different, drawn with the seed, in any order. Right and wrong ones are drawn alike, so that no measure
can be right above chance without looking at the picture.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ringjax.data.example import Example
from ringjax.evaluation.heldout import HeldOut, Line, same_words
from ringjax.evaluation.likelihood import Likelihood
from ringjax.evaluation.question import Cell
from ringjax.evaluation.vision_config import By, ByCodes
from ringjax.inference.trained import TrainedRun

MEASURES: tuple[By, ...] = ("sum", "mean", "lift")
"""Of words after a picture."""


class Choices(NamedTuple):
    """Captions to pick from, and which of them is right."""

    captions: tuple[str, ...]
    right: int


def draw_choices(heldout: HeldOut, line: Line, count: int, seed: int) -> Choices:
    """The choices of a picture or clip: they depend on the seed, the held-out set and the line alone."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{line.kind} {line.index}".encode())])
    own = same_words(line.caption)
    others = [caption for caption in heldout.captions(line.kind) if same_words(caption) != own]
    picked = [others[i] for i in rng.choice(len(others), count - 1, replace=False)]
    right = int(rng.integers(count))
    return Choices((*picked[:right], line.caption, *picked[right:]), right)


def require_choices(heldout: HeldOut, lines: Sequence[Line], count: int) -> None:
    """Raises ValueError where there are too few different captions to choose from."""
    for kind in dict.fromkeys(line.kind for line in lines):
        found = len(heldout.captions(kind))
        if found < count:
            raise ValueError(
                f"the held-out {kind} have {found} different captions, and {count} choices need {count}; give more with"
                f" --data, fewer with --choices, or leave {kind} out of --kinds"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What a model makes of the choices."""

    sums: Float[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    alone: Float[np.ndarray, " n"]
    codes: Float[np.ndarray, " n"] | None = None
    """log p(picture | caption); None: not asked."""

    @property
    def measures(self) -> tuple[ByCodes, ...]:
        """What can be compared."""
        return MEASURES if self.codes is None else (*MEASURES, "codes")

    def picked(self, by: ByCodes) -> int:
        """The likeliest of the choices."""
        return int(np.argmax(self.scores(by)))

    def scores(self, by: ByCodes) -> Float[np.ndarray, " n"]:
        """What is compared."""
        if by == "codes":
            return self.codes
        return {"sum": self.sums, "mean": self.sums / self.tokens, "lift": self.sums - self.alone}[by]


class Judge:
    """A run that says how likely captions are, after pictures and without them."""

    def __init__(self, run: TrainedRun, prompt: str = ""):
        run.require_vision()
        self.run, self._prompt = run, prompt
        self._likelihood = Likelihood(run.model, run.parallel)
        self._alone: dict[str, float] = {}

    def __call__(self, codes: Int[np.ndarray, "frames codes"], captions: Sequence[str]) -> Verdict:
        """How likely each caption is after a picture or clip (and the prompt after it)."""
        return self.after(self.run.prompts.see([codes], self._prompt), captions)

    def of_codes(self, codes: Int[np.ndarray, "frames codes"], words: Sequence[str]) -> Float[np.ndarray, " n"]:
        """How likely the picture or clip is after each of the words that it may have been drawn after."""
        return self._likelihood.of([self.run.prompts.drawn(text, codes) for text in words])

    def after(self, prompt: Example, captions: Sequence[str], alone: Example | None = None) -> Verdict:
        """The same after any prompt; `alone` is the one that lift compares with (None: no picture)."""
        answers = [self.answer(caption) for caption in captions]
        sums = self._likelihood(prompt, answers)
        tokens = np.array([len(answer) for answer in answers])
        without = self._without(captions, answers) if alone is None else self._likelihood(alone, answers)
        return Verdict(sums, tokens, without)

    def answer(self, caption: str) -> list[int]:
        """A caption as it is learned: its tokens, and the one that ends it where the run has such."""
        ends = self.run.data.add_eos or self.run.prompt_form == "lwm"
        return [*self.run.tokenizer.encode(caption), *([self.run.tokenizer.eos_id] if ends else [])]

    def _without(self, captions: Sequence[str], answers: Sequence[Sequence[int]]) -> Float[np.ndarray, " n"]:
        """log p without the picture, computed once a caption."""
        if any(caption not in self._alone for caption in captions):
            found = self._likelihood(self.run.prompts.text(self._prompt), answers)
            self._alone |= dict(zip(captions, map(float, found), strict=True))
        return np.array([self._alone[caption] for caption in captions])


def choice_record(
    method: str, cell: Cell, choices: Choices, verdict: Verdict, by: ByCodes, seconds: float, compiled: bool
) -> dict[str, Any]:
    """A line of the results: everything that the table needs, and enough to compare otherwise later."""
    picked = {name: verdict.picked(name) for name in verdict.measures}
    more = {} if verdict.codes is None else {"of_codes": [round(float(x), 4) for x in verdict.codes]}
    return {
        "method": method, **cell._asdict(), "score": float(picked[by] == choices.right),
        "right": {name: found == choices.right for name, found in picked.items()},
        "answers": [choices.captions[choices.right]], "text": choices.captions[picked[by]],
        "choices": list(choices.captions), "log_likelihoods": [round(float(x), 4) for x in verdict.sums],
        "answer_tokens": verdict.tokens.tolist(), "alone": [round(float(x), 4) for x in verdict.alone],
        "seconds": round(seconds, 4), "compiled": compiled, **more,
    }  # fmt: skip
