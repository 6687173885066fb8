"""Dropped captions: what classifier-free guidance compares with is learned from the same examples.

    <s> a red fox <vision> codes </vision> </s>     with the caption
    <s> <vision> codes </vision> </s>               without: the form that guidance asks for (LWM)
     ·     1        1      1        1               1: bears loss

Ho & Salimans 2022, arXiv:2207.12598. Whether an example loses its caption follows from the run's seed and the place of
the example in its source's stream, so it is another draw in every epoch and the same after a resume.
"""

import dataclasses

import numpy as np

from ringjax.data.example import Example
from ringjax.data.tokenizers import VISION_START, TextTokenizer

# Keeps the draws apart from those of the order in which examples are read.
_STREAM = 0xD209


def is_dropped(rate: float, seed: int, source: int, index: int) -> bool:
    """Whether example `index` of a source's stream loses its caption, if it has one."""
    return bool(rate) and np.random.default_rng((seed, source, index, _STREAM)).random() < rate


@dataclasses.dataclass(frozen=True)
class Unconditional:
    """Takes the condition out of examples that ask for a picture."""

    tokenizer: TextTokenizer

    def of(self, example: Example) -> Example | None:
        """The example without the text before its picture; None where it is no drawing after a text.

        That is: text without loss, then nothing but loss, which begins with `<vision>`.
        """
        first = int(np.argmax(example.loss))
        start = 1 if example.tokens[0] == self.tokenizer.bos_id and not example.modality[0] else 0
        marker = self.tokenizer.marker(VISION_START)
        codes = first + len(marker)
        if (
            first <= start
            or example.modality[:first].any()
            or not example.loss[first:].all()
            or codes >= len(example)
            or example.tokens[first:codes].tolist() != marker
            or not example.modality[codes]
        ):
            return None
        kept = np.r_[0:start, first : len(example)]
        ahead = None if example.ahead is None else example.ahead[kept]
        return Example(example.tokens[kept], example.modality[kept], example.loss[kept], ahead)
