"""RULER's tasks (Hsieh et al. 2024, arXiv:2404.06654): needles, tracing, counting and answering, in its wording.

    niah_single_1 … 3       noise with a number; prose with a number; prose with a uuid
    niah_multikey_1 … 3     4 keys in prose; a context of nothing but needles; the same with uuids
    niah_multivalue         4 values of one key           niah_multiquery   4 keys asked
    vt                      variable tracking: one chain of 4 hops
    cwe, fwe                common words of a list; frequent words of a coded text (zeta distribution)
    qa                      a paragraph with the answer among others

Score: the share of the expected strings that are in the answer, whatever the case; for `qa`, whether one of them is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ringjax.evaluation import ruler_lists, ruler_qa, ruler_tracing
from ringjax.evaluation.haystack import Haystack
from ringjax.evaluation.question import Cell, Form, Question, insert_at, room
from ringjax.evaluation.words import distinct, vocabulary_of

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_DEPTHS = np.linspace(0, 100, 40)


class Niah(NamedTuple):
    """A variant of the needle task: what it is hidden in, kinds of keys and values, and how many of each."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    key_count: int = 1
    value_count: int = 1
    query_count: int = 1


VARIANTS = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", key_count=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", value_count=4),
    "niah_multiquery": Niah("essay", key_count=4, query_count=4),
}
OTHERS: dict[str, Callable] = {
    "vt": ruler_tracing.variable_tracking,
    "cwe": ruler_lists.common_words,
    "fwe": ruler_lists.frequent_words,
    "qa": ruler_qa.answering,
}
TASKS = (*VARIANTS, *OTHERS)


@dataclasses.dataclass(frozen=True)
class RulerTask:
    """`per_task` questions of each of `tasks`. `passages` are what `qa` asks about."""

    form: Form
    haystack: Haystack
    tasks: tuple[str, ...]
    per_task: int
    words: Sequence[str]
    passages: Sequence[ruler_qa.Passage]
    seed: int = 0
    max_new_tokens: int = 128

    @classmethod
    def of(cls, form: Form, haystack: Haystack, texts: list[str], passages=None, **options) -> "RulerTask":
        """Word lists and, where there are no `passages`, questions made from the `texts`."""
        passages = ruler_qa.from_texts(texts) if passages is None else passages
        return cls(form, haystack, words=vocabulary_of(texts), passages=passages, **options)

    def cells(self, length: int) -> list[Cell]:
        """Task by task."""
        return [Cell(task, length, None, i) for task in self.tasks for i in range(self.per_task)]

    def ask(self, cell: Cell) -> Question:
        """See `Task`."""
        rng = cell.rng(self.seed)
        if cell.part in VARIANTS:
            return self._niah(cell, VARIANTS[cell.part], rng)
        return OTHERS[cell.part](self, cell, rng)

    def score(self, question: Question, text: str) -> float:
        """See above."""
        found = [answer.lower() in text.lower() for answer in question.answers]
        return float(any(found)) if question.cell.part == "qa" else float(np.mean(found))

    def noise(self) -> Haystack:
        """RULER's noise without end."""
        return Haystack.of([NOISE], self.form.vocabulary, repeat=True)

    def _niah(self, cell: Cell, variant: Niah, rng: np.random.Generator) -> Question:
        keys = distinct(variant.keys, variant.key_count, rng)
        values = distinct(variant.values, variant.key_count * variant.value_count, rng)
        owned = {key: values[i :: variant.key_count] for i, key in enumerate(keys)}
        asked = [keys[i] for i in rng.permutation(len(keys))[: variant.query_count]]
        expected = tuple(value for key in asked for value in owned[key])
        words, begun, query = _wording(variant, asked, len(expected))
        before, after = self.form.wrap(words, begun)
        encode, kind = self.form.vocabulary.encode, variant.values
        needles = [encode(_needle(kind, key, value, variant)) for key in keys for value in owned[key]]
        budget = room(cell, before, after, *needles)
        hay = self._hay(variant, budget, rng, set(keys))
        depths = rng.choice(_DEPTHS, len(needles), replace=False)
        context = insert_at(hay, list(zip(depths, needles)), self.form.vocabulary)
        return Question(cell, before, tuple(context), after, query, expected)

    def _hay(self, variant: Niah, budget: int, rng: np.random.Generator, taken: set[str]) -> list[int]:
        if variant.haystack == "essay":
            return self.haystack.excerpt(budget, rng)
        if variant.haystack == "noise":
            return self.noise().excerpt(budget, rng)
        hay: list[int] = []
        while True:  # other needles, as many as there is room for
            key, value = distinct(variant.keys, 1, rng)[0], distinct(variant.values, 1, rng)[0]
            needle = self.form.vocabulary.encode(_needle(variant.values, key, value, variant))
            if len(hay) + len(needle) > budget:
                return hay
            hay += [] if key in taken else needle


def _needle(kind: str, key: str, value: str, variant: Niah) -> str:
    end = "\n" if variant.haystack == "needle" else " "
    return " " * (variant.haystack == "essay") + NEEDLE.format(kind=kind, key=key, value=value) + end


def _wording(variant: Niah, asked: list[str], expected: int) -> tuple[str, str, str]:
    """The words, how the answer begins, and the question alone; in the singular where there is one value."""
    kind, keys = variant.values, ", ".join(asked[:-1]) + (", and " if len(asked) > 1 else "") + asked[-1]
    question = f"What are all the special magic {kind} for {keys} mentioned in the provided text?"
    hidden = f"Some special magic {kind} are hidden within the following text."
    begun = f" The special magic {kind} for {keys} mentioned in the provided text are"
    if expected == 1:
        kind = kind[:-1]
        question = f"What is the special magic {kind} for {keys} mentioned in the provided text?"
        hidden = f"A special magic {kind} is hidden within the following text."
        begun = f" The special magic {kind} for {keys} mentioned in the provided text is"
    words = f"{hidden} Make sure to memorize it. I will quiz you about the {kind} afterwards.\n{{context}}\n{question}"
    return words, begun, question
