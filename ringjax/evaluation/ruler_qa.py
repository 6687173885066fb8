"""RULER's question answering: the paragraph that holds the answer among paragraphs that do not.

Passages are supplied as JSONL of {context, question, answers}. Without any, they are made from plain text: a sentence
of a paragraph is quoted, and the words with which the next one begins are asked.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ringjax.evaluation.question import Cell, Question, room
from ringjax.json_text import parse_json

_SAME = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_WORDS = f"{_SAME}\n\nThe following are given documents.\n\n{{context}}\n\n{_SAME}\n\nQuestion: "
_MADE = 4
"""Words of the next sentence that are asked for."""
_TRIES = 20
"""Paragraphs that do not fit any more until the context counts as full."""


class Passage(NamedTuple):
    """A paragraph, a question about it, and answers of which one is enough."""

    context: str
    question: str
    answers: tuple[str, ...]


def read_passages(path: str | Path) -> list[Passage]:
    """Passages of a JSONL file. Raises ValueError, naming the line, for what is none."""
    passages = []
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            passages.append(_passage(line, f"{path} line {number}"))
    if not passages:
        raise ValueError(f"{path} holds no passage; give one a line: {{context, question, answers}}")
    return passages


def _passage(line: str, where: str) -> Passage:
    try:
        record = parse_json(line)
        context, question, answers = record["context"], record["question"], record["answers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no {{context, question, answers}}: {error!r}") from None
    answers = [answers] if isinstance(answers, str) else answers
    fits = isinstance(context, str) and isinstance(question, str) and isinstance(answers, list) and answers
    if not fits or not all(isinstance(answer, str) and answer for answer in answers):
        raise ValueError(f"{where}: context and question must be text, answers a list of texts that are not empty")
    return Passage(context, question, tuple(answers))


def from_texts(texts: Sequence[str], most: int = 2000) -> list[Passage]:
    """One passage of each paragraph with at least three sentences, up to `most`."""
    passages = []
    for paragraph in (part.strip() for text in texts for part in re.split(r"\n\s*\n|\n", text)):
        sentences = re.split(r"(?<=[.!?]) +", paragraph)
        if len(sentences) < 3 or len(paragraph) > 1000 or len(sentences[1]) < 20:
            continue
        words = re.findall(r"[\w’'-]+", sentences[1])[:_MADE]
        if len(words) == _MADE and (answer := " ".join(words)) in sentences[1]:
            asked = f'With which {_MADE} words begins the sentence that follows "{sentences[0]}"?'
            passages.append(Passage(paragraph, asked, (answer,)))
        if len(passages) == most:
            break
    return passages


def answering(task, cell: Cell, rng: np.random.Generator) -> Question:
    """The paragraph at a random place among as many others as there is room for."""
    if not task.passages:
        raise ValueError("there is no passage to ask about: the haystack has no paragraphs; give passages with --qa")
    order = rng.permutation(len(task.passages))
    asked = task.passages[order[0]]
    before, after = task.form.wrap(_WORDS + asked.question, " Answer:")
    encode = task.form.vocabulary.encode
    budget = room(cell, before, after)
    # The number in front of a document is at most so long; they are numbered when their order is known.
    documents, used = [asked.context], len(encode(_document(9999, asked.context)))
    if used > budget:
        raise ValueError(f"length {cell.length} is too short for the passage of this question ({used} tokens)")
    missed = 0
    for i in order[1:]:
        other = task.passages[i].context
        if other == asked.context or any(answer.lower() in other.lower() for answer in asked.answers):
            continue
        size = len(encode(_document(9999, other)))
        if used + size <= budget:
            documents.append(other)
            used += size
        elif (missed := missed + 1) == _TRIES:
            break
    rng.shuffle(documents)
    context = [i for number, text in enumerate(documents, 1) for i in encode(_document(number, text))]
    return Question(cell, before, tuple(context), after, asked.question, asked.answers)


def _document(number: int, text: str) -> str:
    return f"Document {number}:\n{text}\n\n"
