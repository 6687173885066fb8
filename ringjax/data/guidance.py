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

_MASK = 2**64 - 1


def is_dropped(rate: float, seed: int, source: int, index: int) -> bool:
    """Whether example `index` of a source's stream loses its caption, if it has one."""
    return bool(rate) and _mixed(_mixed(_mixed(seed) ^ source) ^ index) < rate * 2**64


def _mixed(x: int) -> int:
    """SplitMix64 (Steele et al. 2014): a number of 64 bits, each of which depends on all of `x`.

    Asked for every example: a NumPy generator takes ten times as long to make.
    """
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


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
