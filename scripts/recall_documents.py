"""Documents that ask at their end for facts that were said somewhere in them: what a long context is for.

    python scripts/recall_documents.py data/text recall.jsonl --tokens 32768 --tokenizer MODEL.gguf --without emma

A document is an excerpt of a book with up to 24 sentences put between its paragraphs ("The locker code of Ruth Okafor
is 40317."), and all of them asked in another order; only the answers bear loss. A share (`--chat`) is a conversation in
the words of the model's chat template, so that it stays one that answers. Two thirds are as long as a row, the
rest shorter by any factor down to 16, so that the distance varies. Wording, keys and values are other ones than those
of the needle evaluation (cities and their "special magic numbers").
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ringjax.data.fields import BOS, EOS
from ringjax.data.tokenizers import TextTokenizer, load_tokenizer
from ringjax.inference.chat_template import ChatTemplate
from ringjax.interop.published import open_published

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
# Begin and end token, and some to spare: fields are counted one by one.
ENDS = 8
CONTEXT = "@context@"
FIRST, LAST, WORDS = _FIRST.split(), _LAST.split(), _WORDS.split()
NUMBERED = ("locker code", "membership number", "account number", "ticket number", "room key", "invoice number")
WORDED = ("passphrase", "call sign", "team name", "boat's name")
SAYINGS = (
    "The {thing} of {person} is {value}.", "{person}'s {thing} is {value}.",
    "It is written down that the {thing} of {person} is {value}.",
    "Let it be noted: for {person}, the {thing} is {value}.",
)  # fmt: skip
ASKED = ("What is the {thing} of {person}?", "Which {thing} does {person} have?", "Tell me the {thing} of {person}.")
SEVERAL = (
    "What are the {thing}s of {people}?", "Which {thing}s do {people} have?", "Tell me the {thing}s of {people}.",
)  # fmt: skip
TOGETHER = (0.6, 0.3, 0.1)  # how often one, two and three facts are asked in one message


def facts(count: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """So many different pairs of a person and a thing, with what is said, asked and answered.

    A document has few things, so that several people have the same.
    """
    numbered, worded = rng.permutation(NUMBERED)[: rng.integers(1, 4)].tolist(), WORDED[rng.integers(len(WORDED))]
    found: dict[tuple[str, str], dict[str, str]] = {}
    while len(found) < count:
        person = f"{FIRST[rng.integers(len(FIRST))]} {LAST[rng.integers(len(LAST))]}"
        thing = numbered[rng.integers(len(numbered))] if rng.random() < 0.75 else worded
        value = " ".join(rng.choice(WORDS, 2, replace=False)) if thing == worded else _number(rng)
        words = {"person": person, "thing": thing, "value": value}
        found[person, thing] = {
            **words, "said": SAYINGS[rng.integers(len(SAYINGS))].format(**words),
            "asked": ASKED[rng.integers(len(ASKED))].format(**words),
            "answered": SAYINGS[0].format(**words),
        }  # fmt: skip
    return list(found.values())


def _number(rng: np.random.Generator) -> str:
    return "".join(str(digit) for digit in rng.integers(0, 10, rng.integers(4, 10)))


@dataclasses.dataclass(frozen=True)
class Part:
    """A field of a line: a text, in which CONTEXT stands for the excerpt, or a special token by its name."""

    text: str
    loss: bool = False
    special: bool = False


def questions(made: Sequence[Mapping[str, str]]) -> list[Part]:
    """The excerpt, and each fact asked as in a quiz."""
    parts = [Part(CONTEXT)]
    for fact in made:
        parts += [Part(f"\n\nQuestion: {fact['asked']}\nAnswer:"), Part(f" {fact['value']}", loss=True)]
    return parts


def asked_together(some: Sequence[Mapping[str, str]], rng: np.random.Generator) -> str:
    """One sentence for the same thing of several people, else one a fact."""
    if len(some) == 1 or len({fact["thing"] for fact in some}) > 1:
        return " ".join(fact["asked"] for fact in some)
    *others, last = (fact["person"] for fact in some)
    people = f"{', '.join(others)} and {last}"
    return SEVERAL[rng.integers(len(SEVERAL))].format(thing=some[0]["thing"], people=people)


def conversation(
    made: Sequence[Mapping[str, str]], template: ChatTemplate, tokenizer: TextTokenizer, rng: np.random.Generator
) -> list[Part]:
    """The excerpt and the first question in one message, the other questions in the next, up to three facts each."""
    turns, rest = [], list(made)
    while rest:
        count = 1 + int(rng.choice(len(TOGETHER), p=TOGETHER))
        same = [fact for fact in rest if fact["thing"] == rest[0]["thing"]]  # of several people, if there are any
        some = (same + [fact for fact in rest if fact not in same])[:count]
        rest = [fact for fact in rest if fact not in some]
        briefly = len(some) == 1 and rng.random() < 0.4
        answers = [fact["value" if briefly else "answered"] for fact in some]
        turns.append((asked_together(some, rng), " ".join(answers)))
    messages, texts = [], {}
    for number, (question, answer) in enumerate(turns):
        for role, name, text in (("user", f"@q{number}@", question), ("assistant", f"@a{number}@", answer)):
            messages.append({"role": role, "content": name})
            texts[name] = text
    texts["@q0@"] = f"{CONTEXT} {texts['@q0@']}"
    names = "|".join(re.escape(name) for name in tokenizer.specials)
    pieces = [piece for piece in re.split(f"({names}|@[qa][0-9]+@)", template.render(messages)) if piece]
    last = pieces.index(f"@a{len(turns) - 1}@")  # and the token that ends it; then the template asks for one more
    ends = (place for place in range(last, len(pieces)) if pieces[place] in tokenizer.specials)
    pieces = pieces[: next(ends, last) + 1]
    parts: list[Part] = []
    for piece in pieces:
        answered = bool(parts) and parts[-1].loss and not parts[-1].special
        if piece in tokenizer.specials:
            parts.append(Part(_name(piece, tokenizer), loss=answered, special=True))
        elif piece.isspace() and answered:  # before the token that ends the answer
            parts.append(Part(piece, loss=True))
        elif piece.startswith("@a"):
            parts.append(Part(texts[piece], loss=True))
        elif parts and not parts[-1].special and not parts[-1].loss:
            parts[-1] = Part(parts[-1].text + texts.get(piece, piece))
        else:
            parts.append(Part(texts.get(piece, piece)))
    return parts


def document(
    paragraphs: Sequence[str],
    sizes: Sequence[int],
    tokens: int,
    tokenizer: TextTokenizer,
    rng: np.random.Generator,
    template: ChatTemplate | None = None,
) -> dict[str, str]:
    """A line of jsonl of at most `tokens` tokens, unless its facts alone take more; `sizes` are those of paragraphs."""
    made = facts(min(int(rng.integers(8, 25)), max(2, tokens // 200)), rng)
    order = [made[place] for place in rng.permutation(len(made))]
    parts = questions(order) if template is None else conversation(order, template, tokenizer, rng)
    taken = sum(1 if part.special else len(tokenizer.encode(part.text)) for part in parts if CONTEXT not in part.text)
    room, start = tokens - taken - ENDS, int(rng.integers(len(paragraphs)))
    kept, taken = [], 0
    for number in range(len(paragraphs)):  # from any place on, and around the end of the book
        place = (start + number) % len(paragraphs)
        if taken + sizes[place] > room:
            break
        kept.append(place)
        taken += sizes[place]
    while True:  # what an excerpt takes is known once it is joined; a document that is too long would be cut in two
        excerpt = [paragraphs[place] for place in kept]
        for fact in made:
            excerpt.insert(int(rng.integers(len(excerpt) + 1)), fact["said"])
        line = _line(parts, "\n\n".join(excerpt))
        over = len(tokenizer.encode(line["context"])) - room
        if over <= 0 or not kept:
            return line
        while over > 0 and kept:
            over -= sizes[kept.pop()]


def _name(special: str, tokenizer: TextTokenizer) -> str:
    """A special token as `fields` have it. Leaves where they have no name for it."""
    ids = {tokenizer.bos_id: BOS, tokenizer.eos_id: EOS}
    name = ids.get(tokenizer.specials[special], special)
    if not (name.startswith("<|") and name.endswith("|>")):
        raise SystemExit(f"the chat template uses {special}, and only <|…|> can be named in fields; use --chat 0")
    return name


def _line(parts: Sequence[Part], excerpt: str) -> dict[str, str]:
    line, spec = {"fields": ""}, []
    for number, part in enumerate(parts):
        name = json.dumps(part.text) if part.text.isspace() else part.text
        if not part.special and name == part.text:
            name = "context" if CONTEXT in part.text else f"{'a' if part.loss else 'q'}{number}"
            line[name] = part.text.replace(CONTEXT, excerpt)
        spec.append(name if part.loss else f"[{name}]")
    return {**line, "fields": ",".join(spec)}


def write(
    texts: Path, target: Path, tokens: int, total: int, spec: str, without: Sequence[str], seed: int, chat: float = 0
) -> int:
    """The documents of a folder of books; gives how many there are. The file appears when it is whole."""
    tokenizer, rng = load_tokenizer(spec), np.random.default_rng(seed)
    template = ChatTemplate.of(open_published(spec).settings) if chat else None
    if chat and template is None:
        raise SystemExit(f"{spec} has no chat template; without one there are no conversations (--chat 0)")
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
            form = template if rng.random() < chat else None
            line = document(paragraphs, sizes, size, tokenizer, rng, form)
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
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
    parser.add_argument(
        "--chat", type=float, default=0,
        help="share of them in the form of the chat template of --tokenizer, a model's folder or .gguf file",
    )  # fmt: skip
    given = parser.parse_args()
    if not 0 <= given.chat <= 1:
        parser.error(f"--chat {given.chat} must lie between 0 and 1: 0.5 makes half of the documents conversations")
    if given.tokens < 2048:
        parser.error(f"--tokens {given.tokens} must be at least 2048: 24 facts and their questions need room")
    try:
        count = write(
            given.texts, given.target, given.tokens, given.total, given.tokenizer, given.without, given.seed, given.chat
        )
    except (ValueError, FileNotFoundError, NotImplementedError) as error:  # a tokenizer or model that is none
        parser.error(str(error))
    print(f"{given.target}: {count} documents")


if __name__ == "__main__":
    main()
