"""RULER's variable tracking: which names carry a value that is handed on?

VAR ABCDE = 12345   …   VAR FGHIJ = VAR ABCDE   …   VAR KLMNO = VAR FGHIJ   …
"""

import string

import numpy as np

from ringjax.evaluation.question import Cell, Question, insert_at, room

HOPS = 4
_WORDS = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
_BEGUN = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the"
    " value {value}, they are: "
)
_SMALLEST_EXAMPLE = 1500


def variable_tracking(task, cell: Cell, rng: np.random.Generator) -> Question:
    """One chain of four hops in noise, after a small example; the answer is its five names."""
    value, names, statements = _chain(rng)
    question = _WORDS.replace("{value}", value)
    begun = _BEGUN.format(count=len(names), value=value)
    if cell.length >= _SMALLEST_EXAMPLE:  # shorter prompts have no room for one
        question = f"{_example(rng)}\n\n{question}"
    before, after = task.form.wrap(question, begun)
    encode = task.form.vocabulary.encode
    needles = [encode(f"{statement}.\n") for statement in statements]
    hay = task.noise().excerpt(room(cell, before, after, *needles), rng)
    depths = np.sort(rng.choice(np.linspace(0, 100, 40), len(needles), replace=False))
    context = insert_at(hay, list(zip(depths, needles)), task.form.vocabulary)
    query = f"Find all variables that are assigned the value {value} in the text above."
    return Question(cell, before, tuple(context), after, query, names)


def _chain(rng: np.random.Generator) -> tuple[str, tuple[str, ...], list[str]]:
    letters = list(string.ascii_uppercase)
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choice(letters, 5))] = None
    chain, value = tuple(names), str(rng.integers(10000, 100000))
    return value, chain, [f"VAR {name} = {source}" for name, source in
                          zip(chain, [value, *(f"VAR {name}" for name in chain[:-1])])]  # fmt: skip


def _example(rng: np.random.Generator) -> str:
    value, names, statements = _chain(rng)
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    text = "".join(f"{noise}{statement}. " for statement in statements)
    asked = _WORDS.replace("{value}", value).replace("{context}", text)
    return asked + _BEGUN.format(count=len(names), value=value) + " ".join(names)
