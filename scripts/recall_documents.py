"""Documents that ask at their end for facts that were said somewhere in them: what a long context is for.

    python scripts/recall_documents.py data/text recall.jsonl --tokens 32768 --tokenizer MODEL.gguf --without emma

A document is an excerpt of a book with up to 24 sentences put between its paragraphs ("The locker code of Ruth Okafor
is 40317."), and all of them asked in another order; only the answers bear loss. Two thirds are as long as a row, the
rest shorter by any factor down to 16, so that the distance varies. Wording, keys and values are other ones than those
of the needle evaluation (cities and their "special magic numbers").
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ringjax.data.tokenizers import TextTokenizer, load_tokenizer

_FIRST = (
    "Ruth Amir Ingrid Tomas Keiko Bruno Salma Pavel Linnea Oscar Yusuf Greta Mateo Priya Anton Noor Felix Mirela Hugo"
    " Zainab Stefan Aiko Rafael Olga Dmitri Leila Casper Ines Viktor Chidi"
)
_LAST = (
    "Okafor Lindqvist Marchetti Novak Tanaka Haddad Petrov Almeida Brandt Osei Kaur Ferreira Nilsen Cohen Duarte"
    " Yilmaz Horvat Banerjee Kowalski Mbeki Sato Keller Rossi Abebe Jansen"
)
_WORDS = (
    "amber birch copper delta ember falcon garnet harbour indigo juniper kestrel lantern maple nickel orchid pebble"
    " quartz raven saffron thistle umber velvet willow yarrow zephyr"
)
# Begin and end token, with room for one that the ends of fields may take.
ENDS = 8
FIRST, LAST, WORDS = _FIRST.split(), _LAST.split(), _WORDS.split()
NUMBERED = ("locker code", "membership number", "account number", "ticket number", "room key", "invoice number")
WORDED = ("passphrase", "call sign", "team name", "boat's name")
SAYINGS = (
    "The {thing} of {person} is {value}.", "{person}'s {thing} is {value}.",
    "It is written down that the {thing} of {person} is {value}.",
    "Let it be noted: for {person}, the {thing} is {value}.",
)  # fmt: skip
ASKED = ("What is the {thing} of {person}?", "Which {thing} does {person} have?", "{person}'s {thing} is?")


def facts(count: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """So many different pairs of a person and a thing, with what is said, asked and answered."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    while len(found) < count:
        person = f"{FIRST[rng.integers(len(FIRST))]} {LAST[rng.integers(len(LAST))]}"
        things = NUMBERED if rng.random() < 0.75 else WORDED
        thing = things[rng.integers(len(things))]
        value = " ".join(rng.choice(WORDS, 2, replace=False)) if things is WORDED else _number(rng)
        words = {"person": person, "thing": thing, "value": value}
        found[person, thing] = {
            "said": SAYINGS[rng.integers(len(SAYINGS))].format(**words),
            "asked": ASKED[rng.integers(len(ASKED))].format(**words), "value": value,
        }  # fmt: skip
    return list(found.values())


def _number(rng: np.random.Generator) -> str:
    return "".join(str(digit) for digit in rng.integers(0, 10, rng.integers(4, 10)))


def document(
    paragraphs: Sequence[str], sizes: Sequence[int], tokens: int, tokenizer: TextTokenizer, rng: np.random.Generator
) -> dict[str, str]:
    """A line of jsonl of at most `tokens` tokens; `sizes` are those of a book's paragraphs."""
    made = facts(min(int(rng.integers(8, 25)), max(2, tokens // 200)), rng)
    asked, spec = {}, ["[context]"]
    for number, place in enumerate(rng.permutation(len(made))):
        asked[f"q{number}"] = f"\n\nQuestion: {made[place]['asked']}\nAnswer:"
        asked[f"a{number}"] = f" {made[place]['value']}"
        spec += [f"[q{number}]", f"a{number}"]
    questions = sum(len(tokenizer.encode(text)) for text in asked.values())
    room, start = tokens - questions - ENDS, int(rng.integers(len(paragraphs)))
    kept, taken = [], 0
    for number in range(len(paragraphs)):  # from any place on, and around the end of the book
        place = (start + number) % len(paragraphs)
        if taken + sizes[place] > room:
            break
        kept.append(place)
        taken += sizes[place]
    while True:  # what paragraphs and facts take together is known once they are joined: one too many is cut to pieces
        parts = [paragraphs[place] for place in kept]
        for fact in made:
            parts.insert(int(rng.integers(len(parts) + 1)), fact["said"])
        context = "\n\n".join(parts)
        over = len(tokenizer.encode(context)) - room
        if over <= 0 or not kept:
            return {"fields": ",".join(spec), "context": context, **asked}
        while over > 0 and kept:
            over -= sizes[kept.pop()]


def write(texts: Path, target: Path, tokens: int, total: int, spec: str, without: Sequence[str], seed: int) -> int:
    """The documents of a folder of books; gives how many there are. The file appears when it is whole."""
    tokenizer, rng = load_tokenizer(spec), np.random.default_rng(seed)
    files = sorted(file for file in texts.glob("*.txt") if file.stem not in without)
    if not files:
        raise SystemExit(f"{texts} holds no .txt files but {', '.join(without)}")
    books = []
    for file in files:
        paragraphs = [part for part in file.read_text("utf-8").split("\n\n") if part.strip()]
        books.append((paragraphs, [len(tokenizer.encode(part + "\n\n")) for part in paragraphs]))
    unfinished, left, count = target.with_suffix(".part"), total, 0
    with unfinished.open("w", encoding="utf-8") as out:
        while left > 0:
            size = tokens if rng.random() < 2 / 3 else int(tokens / math.exp(rng.random() * math.log(16)))
            paragraphs, sizes = books[rng.integers(len(books))]
            out.write(json.dumps(document(paragraphs, sizes, size, tokenizer, rng), ensure_ascii=False) + "\n")
            left, count = left - size, count + 1
    unfinished.rename(target)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="a folder of books, one a .txt file")
    parser.add_argument("target", type=Path, help="the .jsonl to write")
    parser.add_argument("--tokens", type=int, required=True, help="of the longest documents: the length of a row")
    parser.add_argument("--total", type=int, default=8_000_000, help="tokens of all documents together, about")
    parser.add_argument("--tokenizer", required=True, help="as data.tokenizer of a config")
    parser.add_argument("--without", nargs="*", default=[], help="books to leave out, by name")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.tokens < 2048:
        parser.error(f"--tokens {given.tokens} must be at least 2048: 24 facts and their questions need room")
    count = write(given.texts, given.target, given.tokens, given.total, given.tokenizer, given.without, given.seed)
    print(f"{given.target}: {count} documents")


if __name__ == "__main__":
    main()
