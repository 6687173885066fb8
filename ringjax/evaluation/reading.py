"""How a model answers a question about a long context: the three families, one interface.

exact          the whole context: full attention, on a mesh a ring (also with RoPE stretched: ntk, yarn, linear)
approximate    window: the last W tokens; sinks: the first S as well (Xiao et al. 2023, arXiv:2309.17453)
retrieval      flat, hnsw, lsh: the chunks that an index finds, in a short context (`retrieval.py`)
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ringjax.evaluation.question import Question
from ringjax.inference.sampling import Sampling
from ringjax.inference.session import Session
from ringjax.inference.text_model import TextModel

GREEDY = Sampling(temperature=0)
_ROUND = 256
Enough = Callable[[str], bool]
"""Whether what is written so far has all that was asked: what comes after it would change no score."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """An answer and what it took."""

    text: str
    tokens: int
    """Of the prompt that the model read."""
    first_seconds: float
    """Until the first token of the answer."""
    seconds: float
    """Until the last."""
    cache_bytes: int
    """Of keys and values."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class WholeContext:
    """Reads all of it, with whatever attention the model has."""

    def __init__(self, model: TextModel, length: int, max_new_tokens: int):
        self._model, self._new = model, max_new_tokens
        self._session = open_session(model, length + max_new_tokens)

    def read(self, question: Question, enough: Enough) -> Reading:
        """The greedy answer, until it is `enough`."""
        return answer(self._model, self._session, question.tokens, self._new, enough)

    def force(self, question: Question, expected: Sequence[int]) -> Reading:
        """Whether the model would say `expected`, token by token; see `force`."""
        return force(self._model, self._session, question.tokens, expected)


def open_session(model: TextModel, tokens: int) -> Session:
    """Room for so many tokens, rounded up so that answers of different lengths share their compiled programs."""
    return model.session(-(-tokens // _ROUND) * _ROUND)


def answer(model: TextModel, session: Session, ids: Sequence[int], max_new_tokens: int, enough: Enough) -> Reading:
    """The greedy answer to a prompt, from an empty cache so that times can be compared."""
    session.rewind(0)
    start = time.perf_counter()
    first, text, tokens = 0.0, "", []
    for token in session.generate(ids, max_new_tokens=max_new_tokens, stop_ids=model.stop_ids, sampling=GREEDY):
        first = first or time.perf_counter() - start
        tokens.append(token)
        text = model.vocabulary.decode([token for token in tokens if token not in model.stop_ids])
        if enough(text):
            break
    seconds = time.perf_counter() - start
    return Reading(text, len(ids), first, seconds, session.cache_bytes, {"new_tokens": len(tokens)})


def force(model: TextModel, session: Session, ids: Sequence[int], expected: Sequence[int]) -> Reading:
    """Teacher forcing: after the prompt and each of the `expected` tokens, the likeliest token.

    `text` is what they spell, and `extra["right"]` the share of them that are the expected ones.
    """
    session.rewind(0)
    start = time.perf_counter()
    first, likeliest = 0.0, []
    pending = list(ids)
    for token in expected:
        likeliest += session.generate(pending, max_new_tokens=1, sampling=GREEDY)
        first = first or time.perf_counter() - start
        pending = [int(token)]
    right = sum(a == b for a, b in zip(likeliest, expected)) / len(expected)
    seconds = time.perf_counter() - start
    text = model.vocabulary.decode(likeliest)
    return Reading(text, len(ids), first, seconds, session.cache_bytes, {"right": right})


def peak_bytes() -> int | None:
    """The most memory that a device has used since the program began; None where devices do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return max(peaks, default=None)
