"""Needle in a haystack, as LWM defines it (Liu et al. 2024, arXiv:2402.08268; `eval_needle`, `eval_needle_multi`).

    … haystack \\nThe special magic {city} number is: {7 digits}\\n haystack … What is the special magic {city} number?

One needle, or N of them of which R are asked. The asked needle lies at the cell's depth (of several the first; the
others at random depths of the grid), after the sentence that ends there.
"""

import dataclasses

import numpy as np

from ringjax.evaluation.haystack import Haystack
from ringjax.evaluation.question import Cell, Form, Question, insert_at, room

_CITIES = (
    "Chicago,Yangon,Antananarivo,Colombo,Almaty,Sydney,Mexico City,Seattle,Lagos,Amsterdam,Belgrade,Cairo,Baghdad,"
    "Damascus,Kigali,Dakar,Sofia,Victoria,Tashkent,Mumbai,Barcelona,Amman,Toronto,Bratislava,Johannesburg,Thimphu,"
    "Bangkok,Santiago,San Francisco,Paris,Rabat,Copenhagen,Madrid,Ho Chi Minh City,Sarajevo,Delhi,Istanbul,Khartoum,"
    "Helsinki,Doha,Kuala Lumpur,Budapest,Shanghai,Moscow,Los Angeles,Oslo,Berlin,Bangalore,Tokyo,Melbourne,Port Louis,"
    "Lisbon,Nairobi,Kampala,Lima,Maputo,Vancouver,Dubai,Jakarta,Yerevan,Beirut,Athens,Bucharest,Brussels,Tunis,Astana,"
    "Seoul,Buenos Aires,Vienna"
)
CITIES = tuple(_CITIES.split(","))
NEEDLE = "\nThe special magic {city} number is: {number}\n"
ONE = (
    "{{context}} {question} Don't give information outside the document or repeat your findings. Keep your response"
    " short and direct."
)
SEVERAL = "{{context}} {question} Don't give information outside the document."
_LIKELIHOOD = "The special magic {city} number is:"


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """`needles` in, `retrieve` asked, `per_cell` questions at each of `depths` (percent).

    With `likelihood` the answer has begun already and the digits are all that is left to say. Raises ValueError for
    numbers that do not fit each other.
    """

    form: Form
    haystack: Haystack
    depths: tuple[float, ...]
    per_cell: int = 1
    needles: int = 1
    retrieve: int = 1
    digits: int = 7
    likelihood: bool = False
    seed: int = 0
    max_new_tokens: int | None = None
    """None: room for one sentence a number."""

    def __post_init__(self):
        if self.max_new_tokens is None:
            object.__setattr__(self, "max_new_tokens", 16 + 24 * self.retrieve)
        if self.likelihood:  # the digits are said whatever an answer may be
            object.__setattr__(self, "max_new_tokens", max(self.max_new_tokens, 2 * self.digits + 2))
        if not 1 <= self.retrieve <= self.needles <= len(CITIES):
            raise ValueError(
                f"retrieve {self.retrieve} of needles {self.needles}: ask for at least one, for no more than"
                f" are in, of at most {len(CITIES)}"
            )
        if self.likelihood and self.retrieve > 1:
            raise ValueError(f"score 'likelihood' is about one answer; use retrieve 1, not {self.retrieve}")

    def cells(self, length: int) -> list[Cell]:
        """Depth by depth."""
        return [Cell("needle", length, depth, i) for depth in self.depths for i in range(self.per_cell)]

    def ask(self, cell: Cell) -> Question:
        """See `Task`."""
        rng, encode = cell.rng(self.seed), self.form.vocabulary.encode
        cities = [CITIES[i] for i in rng.choice(len(CITIES), self.needles, replace=False)]
        least = 10 ** (self.digits - 1)
        numbers = [str(rng.integers(least, 10 * least)) for _ in cities]
        depths = [cell.depth, *rng.choice(self.depths, self.needles - 1)]
        asked = list(rng.permutation(self.retrieve)) if self.retrieve > 1 else [0]
        question = self._question([cities[i] for i in asked])
        begun = _LIKELIHOOD.format(city=cities[0]) if self.likelihood else ""
        before, after = self.form.wrap((ONE if self.needles == 1 else SEVERAL).format(question=question), begun)
        needles = [encode(NEEDLE.format(city=city, number=number)) for city, number in zip(cities, numbers)]
        hay = self.haystack.excerpt(room(cell, before, after, *needles), rng)
        context = insert_at(hay, list(zip(depths, needles)), self.form.vocabulary)
        return Question(cell, before, tuple(context), after, question, tuple(numbers[i] for i in asked))

    def score(self, question: Question, text: str) -> float:
        """The share of the numbers that are in the answer."""
        return float(np.mean([answer in text for answer in question.answers]))

    def expected(self, question: Question) -> list[int]:
        """For `likelihood`: the tokens that the answer goes on with."""
        encode = self.form.vocabulary.encode
        begun, whole = encode("number is:"), encode(f"number is: {question.answers[0]}")
        return whole[len(begun) :] if whole[: len(begun)] == begun else encode(f" {question.answers[0]}")

    def _question(self, cities: list[str]) -> str:
        if self.needles == 1:
            return f"What is the special magic {cities[0]} number?"
        if len(cities) == 1:
            return f"What is the special magic number for {cities[0]}?"
        return f"What are the special magic numbers for {', '.join(cities[:-1])}, and {cities[-1]}?"
