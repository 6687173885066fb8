"""RULER's aggregation: the words of a list that occur more often than the others.

cwe    a numbered list; 10 words occur 30 times, all others 3 times (10 and 1 in short contexts)
fwe    a coded text; word number k occurs n · k^−2 / ζ(2) times, the first being "..." (noise)
"""

import string

import numpy as np
from scipy.special import zeta

from ringjax.evaluation.question import Cell, Question, room

COMMON, ALPHA, CODED = 10, 2.0, 2000
_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
    " appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_CWE_BEGUN = " Answer: The top 10 words that appear most often in the list are:"
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared"
    " coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the"
    " three most frequently appeared words in the above coded text?"
)
_FWE_BEGUN = " Answer: According to the coded text above, the three most frequently appeared words are:"


def common_words(task, cell: Cell, rng: np.random.Generator) -> Question:
    """As many rare words as there is room for, after an example with a list of 40 words.

    Short contexts have fewer repeats and no example. Where the words of the language run out, all occur more often.
    """
    for repeats, example in (((30, 3), True), ((10, 1), False)):
        before, after = task.form.wrap((_example(task.words, rng) if example else "") + _CWE, _CWE_BEGUN)
        budget = cell.length - len(before) - len(after)
        most = len(task.words) - COMMON
        make = _maker(task, repeats, rng)
        if len(make(1)[0]) <= budget:
            break
    while len(make(most)[0]) <= budget:
        repeats = (2 * repeats[0], 2 * repeats[1])
        make = _maker(task, repeats, rng)
    context, answers = _largest(make, room(cell, before, after), most, cell)
    return Question(cell, before, tuple(context), after, _CWE.rpartition("Question: ")[2], tuple(answers))


def _maker(task, repeats: tuple[int, int], rng: np.random.Generator):
    """`make(n)`: the tokens of a list with n rare words, the same words for the same n, and the common ones."""
    state = rng.bit_generator.state

    def make(rare: int):
        rng.bit_generator.state = state
        text, answers = _word_list(task.words, COMMON + rare, repeats, rng)
        return task.form.vocabulary.encode(text), answers

    return make


def _example(words, rng: np.random.Generator) -> str:
    text, answers = _word_list(words, 40, (10, 3), rng)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(answers, 1))
    return f"{_CWE.replace('{context}', text)}{_CWE_BEGUN} {listed}\n\n"


def frequent_words(task, cell: Cell, rng: np.random.Generator) -> Question:
    """A text of coded words whose frequencies fall as a zeta distribution; the three after the dots are asked."""
    letters = list(string.ascii_lowercase)
    words = list({"".join(rng.choice(letters, 6)): None for _ in range(CODED)})
    words[0] = "..."
    before, after = task.form.wrap(_FWE, _FWE_BEGUN)
    shares = np.arange(1, len(words) + 1, dtype=float) ** -ALPHA / zeta(ALPHA)
    state = rng.bit_generator.state

    def make(size: int):
        rng.bit_generator.state = state
        text = [word for word, count in zip(words, (size * shares).astype(int)) for _ in range(count)]
        rng.shuffle(text)
        return task.form.vocabulary.encode(" ".join(text)), words[1:4]

    context, answers = _largest(make, room(cell, before, after), cell.length, cell)
    return Question(cell, before, tuple(context), after, _FWE.rpartition("\n")[2], tuple(answers))


def _word_list(words, count: int, repeats: tuple[int, int], rng: np.random.Generator):
    chosen = [words[i] for i in rng.choice(len(words), count, replace=False)]
    common, rare = chosen[:COMMON], chosen[COMMON:]
    listed = common * repeats[0] + rare * repeats[1]
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), common


def _largest(make, budget: int, most: int, cell: Cell):
    """What `make(n)` gives for the largest n at which its tokens fit. Raises ValueError where not even one does."""
    low, high = 1, most + 1
    if len(make(low)[0]) > budget:
        raise ValueError(f"length {cell.length} is too short for {cell.part}; ask for more")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(make(middle)[0]) <= budget else (low, middle)
    return make(low)
