"""One example: tokens of text and vision, and which of them are to be learned."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from ringjax.data.errors import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A document, a captioned picture, a clip with a question: what attends to itself and to nothing else.

    tokens    int32 [n]   text ids, or vision ids where `modality` is true
    modality  bool  [n]   true: a vision token
    loss      bool  [n]   true: the token is a target that counts (the first token never is one)
    ahead     int32 [n]   how many of the tokens after it a token sees as well; None: none
    """

    tokens: Int[np.ndarray, " n"]
    modality: Bool[np.ndarray, " n"]
    loss: Bool[np.ndarray, " n"]
    ahead: Int[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def pairs(self) -> int:
        """Tokens that have a next token: what the example takes up in a row."""
        return max(len(self.tokens) - 1, 0)

    @property
    def loss_tokens(self) -> int:
        """N_i of the example weights: targets that count."""
        return int(np.count_nonzero(self.loss[1:]))


def require_usable(example: Example, place: str) -> Example:
    """The example, if something can be learned from it.

    Raises:
        DataError: fewer than two tokens, or no token bears loss.
    """
    if len(example) < 2:
        raise DataError(f"{place}: the example has {len(example)} token(s); it needs at least two to predict one")
    if example.loss_tokens == 0:
        raise DataError(f"{place}: no token bears loss; leave a field without [ ]")
    return example


def frame_spans(example: Example, vision_codes: int) -> Int[np.ndarray, "frames 2"]:
    """Start and stop of every frame, its end mark included; a frame is cut off by a change of modality too."""
    vision = example.modality
    # Token i + 1 is in the frame of token i.
    goes_on = vision[1:] & vision[:-1] & (example.tokens[:-1] < vision_codes)
    starts, last = vision.copy(), vision.copy()
    starts[1:] &= ~goes_on
    last[:-1] &= ~goes_on
    return np.array([starts.nonzero()[0], last.nonzero()[0] + 1]).T


def see_whole_frames(example: Example, vision_codes: int) -> Example:
    """The example with `ahead` set so that every token of a frame without loss sees its whole frame.

    Frames that bear loss stay causal: a token that sees its own target learns to copy it.
    """
    ahead = np.zeros(len(example), np.int32)
    if np.count_nonzero(example.modality & ~example.loss):  # else every frame bears loss
        for start, stop in frame_spans(example, vision_codes).tolist():
            if not np.count_nonzero(example.loss[start:stop]):
                ahead[start:stop] = np.arange(stop - start - 1, -1, -1)
    return Example(example.tokens, example.modality, example.loss, ahead)
