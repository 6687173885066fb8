"""RULER's tasks: each can be answered from its context, in its wording, within its length."""

import json
import re
from collections import Counter

import pytest

from ringjax.evaluation.question import Cell
from ringjax.evaluation.ruler import TASKS, RulerTask
from ringjax.evaluation.ruler_qa import Passage, from_texts, read_passages
from tests.evaluation import small

LENGTH = 4500  # bytes: about a thousand words


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    form = small.form(tmp_path_factory.mktemp("ruler"))
    return RulerTask.of(form, small.haystack(form), [small.TEXT], tasks=TASKS, per_task=2)


def read(task, question):
    return task.form.vocabulary.decode(question.context)


@pytest.mark.parametrize("part", TASKS)
def test_the_answer_is_in_the_context_and_the_length_is_kept(task, part):
    question = task.ask(Cell(part, LENGTH, None, 0))
    text = read(task, question)
    assert all(answer in text for answer in question.answers)
    piece = 220 if part in ("qa", "niah_multikey_2", "niah_multikey_3", "cwe") else 60  # what is added whole
    assert LENGTH - piece < len(question.tokens) <= LENGTH
    assert task.ask(Cell(part, LENGTH, None, 0)) == question != task.ask(Cell(part, LENGTH, None, 1))
    assert task.score(question, "I say " + " ".join(question.answers).upper()) == 1
    assert task.score(question, "I do not know.") == 0


NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")


@pytest.mark.parametrize(
    "part, keys, values, asked",
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles_of_all_kinds(task, part, keys, values, asked):
    question = task.ask(Cell(part, LENGTH, None, 3))
    found = NEEDLE.findall(read(task, question))
    assert len({key for _, key, _ in found}) == keys and len({value for *_, value in found}) == values
    expected = [value for _, key, value in found if key in question.query]
    assert sorted(expected) == sorted(question.answers) and len(expected) == asked
    kind = "uuid" if part == "niah_single_3" else "number"
    wording = f"What is the special magic {kind} for " if asked == 1 else f"What are all the special magic {kind}s for "
    assert question.query.startswith(wording) and question.query.endswith(" mentioned in the provided text?")
    assert len(question.answers[0]) == (36 if kind == "uuid" else 7)


def test_a_haystack_of_needles(task):
    found = NEEDLE.findall(read(task, question := task.ask(Cell("niah_multikey_2", LENGTH, None, 0))))
    assert len(found) > 40 and [value for _, key, value in found if key in question.query] == list(question.answers)


def test_a_chain_of_variables(task):
    question = task.ask(Cell("vt", LENGTH, None, 0))
    value = re.search(r"the value (\d+)", question.query)[1]
    held = {}
    for name, source in re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)\.", read(task, question)):
        held[name] = held.get(source, source)
    assert [name for name, what in held.items() if what == value] == list(question.answers) and len(held) == 5


def test_lists_of_words(task):
    common = task.ask(Cell("cwe", LENGTH, None, 0))
    counts = Counter(re.findall(r"\d+\. (\w+)", read(task, common)))
    assert {word for word, _ in counts.most_common(10)} == set(common.answers)
    assert set(counts.values()) == {20, 2}
    longer = task.ask(Cell("cwe", 9000, None, 0))
    assert set(Counter(re.findall(r"\d+\. (\w+)", read(task, longer))).values()) == {30, 3}
    assert "most often in the list are: 1. " in task.form.vocabulary.decode(longer.before)
    assert len(task.ask(Cell("cwe", 30000, None, 0)).tokens) > 29500  # though this language has but 200 words
    frequent = task.ask(Cell("fwe", LENGTH, None, 0))
    ranked = Counter(read(task, frequent).split()).most_common(5)
    assert ranked[0][0] == "..." and tuple(word for word, _ in ranked[1:4]) == frequent.answers
    assert [count / ranked[0][1] for _, count in ranked[1:4]] == pytest.approx([1 / 4, 1 / 9, 1 / 16], abs=0.01)


def test_questions_about_passages(task, tmp_path):
    passage = next(p for p in from_texts([small.TEXT]) if p.context == small.PARAGRAPHS[1])
    assert passage.answers == ("Sentence number 5 is",) and '"Sentence number 4 is about rain."' in passage.question
    file = tmp_path / "qa.jsonl"
    lines = [{"context": f"The cat {i} is {c}.", "question": f"What is cat {i}?", "answers": [c, c.upper() + "!"]}
             for i, c in enumerate(["red", "green", "blue"])]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    passages = read_passages(file)
    assert passages[1] == Passage("The cat 1 is green.", "What is cat 1?", ("green", "GREEN!"))
    supplied = RulerTask.of(task.form, task.haystack, [], passages, tasks=("qa",), per_task=1)
    question = supplied.ask(Cell("qa", 700, None, 0))
    assert sorted(re.findall(r"Document (\d):", read(task, question))) == ["1", "2", "3"]
    assert supplied.score(question, f"it is {question.answers[0]}") == 1  # one of them is enough
    for line, message in (("{}", "line 1 is no"), ('{"context": 1, "question": "a", "answers": ["b"]}', "must be text"),
                          ("", "holds no passage")):  # fmt: skip
        file.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_passages(file)


def test_lengths_without_room(task):
    for part in TASKS:
        with pytest.raises(ValueError, match="length 60"):
            task.ask(Cell(part, 60, None, 0))
