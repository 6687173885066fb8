"""A question about a long context, and the form in which a model is asked.

    before                context                      after
    [template, words] [haystack needle haystack] [question, template, beginning of the answer]

Questions depend on the seed and their cell alone: every method is asked the same ones, and a run that goes on asks
what it would have asked.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ringjax.inference.text_model import TextModel
from ringjax.inference.vocabulary import Vocabulary

LWM, NONE, CHAT = "lwm", "none", "chat"
# Characters that no question holds, where the context goes.
_HERE = "\ue000\ufffc\ue000"


class Cell(NamedTuple):
    """Where a question stands in the grid of an evaluation."""

    part: str
    """The task, or the one of several."""
    length: int
    """Tokens of the prompt."""
    depth: float | None
    """Percent of the context before the needle; None where a task has no depths."""
    index: int
    """Which of the questions of the same kind."""

    def rng(self, seed: int) -> np.random.Generator:
        """The random numbers of this cell, whatever else is asked and in which order."""
        name = f"{self.part} {self.length} {self.depth} {self.index}"
        return np.random.default_rng([seed, zlib.crc32(name.encode())])


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt in tokens, in three parts, and what the answer should hold."""

    cell: Cell
    before: tuple[int, ...]
    context: tuple[int, ...]
    after: tuple[int, ...]
    query: str
    """What is asked, in words: what retrieval looks for."""
    answers: tuple[str, ...]

    @property
    def tokens(self) -> list[int]:
        """The whole prompt."""
        return [*self.before, *self.context, *self.after]


class Task(Protocol):
    """Makes questions and judges answers; knows nothing of models."""

    max_new_tokens: int

    def cells(self, length: int) -> list[Cell]:
        """What is asked at a length."""

    def ask(self, cell: Cell) -> Question:
        """The question of a cell, always the same. Raises ValueError where the cell has no room for it."""

    def score(self, question: Question, text: str) -> float:
        """From 0 to 1."""


class Form:
    """How words are put to a model.

        lwm    You are a helpful assistant. USER: {words} ASSISTANT:␣       (LWM's needle test)
        chat   the model's own chat template, the words as the user's turn
        none   the words alone

    Raises ValueError for `chat` where the model has no template.
    """

    def __init__(self, model: TextModel, template: str = LWM):
        self.model, self.vocabulary, self.template = model, model.vocabulary, template
        if template == CHAT:
            model.chat_ids([{"role": "user", "content": ""}])

    def wrap(self, words: str, answer: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The prompt before and after the context, which goes where `words` has `{context}`.

        `answer` is how the answer begins already.
        """
        content = words.replace("{context}", _HERE)
        if self.template == CHAT:
            text = self.model.template.render([{"role": "user", "content": content}])
            before, after = self._split(text)
            specials = [content]
            ends = self.vocabulary.encode_template(after, specials) + self.vocabulary.encode(answer.strip())
            return tuple(self.vocabulary.encode_template(before, specials)), tuple(ends)
        text = content + answer
        if self.template == LWM:
            text = f"You are a helpful assistant. USER: {content} ASSISTANT: {answer.strip()}"
        before, after = self._split(text)
        return tuple(self.vocabulary.prompt(before)), tuple(self.vocabulary.encode(after))

    def _split(self, text: str) -> tuple[str, str]:
        parts = text.split(_HERE)
        if len(parts) != 2:
            raise ValueError(
                f"the chat template shows a message {len(parts) - 1} times, not once; use --template lwm or none"
            )
        return parts[0], parts[1]


def sentence_end(ids: Sequence[int], place: int, vocabulary: Vocabulary) -> int:
    """The last place at or before `place` that follows the end of a sentence; `place` where there is none."""
    for end in range(place, 0, -1):
        if vocabulary.decode([ids[end - 1]]).rstrip().endswith((".", "!", "?")):
            return end
    return place


def insert_at(ids: list[int], needles: Sequence[tuple[float, Sequence[int]]], vocabulary: Vocabulary) -> list[int]:
    """`ids` with each needle (depth in percent, tokens) after the sentence that ends at or before its depth."""
    places = []
    for depth, needle in needles:
        place = int(len(ids) * depth / 100)
        places.append((place if depth >= 100 else sentence_end(ids, place, vocabulary), needle))
    woven, done = [], 0
    for place, needle in sorted(places, key=lambda pair: pair[0]):
        woven += [*ids[done:place], *needle]
        done = place
    return woven + ids[done:]


def room(cell: Cell, *parts: Sequence[int]) -> int:
    """Tokens that are left for the haystack. Raises ValueError where that is none."""
    taken = sum(map(len, parts))
    if taken >= cell.length:
        raise ValueError(
            f"length {cell.length} of {cell.part}: question and needles alone are {taken} tokens; ask for more"
        )
    return cell.length - taken
