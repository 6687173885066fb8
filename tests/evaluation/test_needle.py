"""Needles: where they lie, how long the prompt is, that questions depend on their cell alone, and the scores."""

import re

import numpy as np
import pytest

from ringjax.evaluation.haystack import Haystack, read_texts
from ringjax.evaluation.needle import CITIES, NeedleTask
from ringjax.evaluation.question import Cell, Form, insert_at
from tests.evaluation import small

DEPTHS = (0.0, 30.0, 100.0)
NEEDLE = re.compile(r"\nThe special magic (.+?) number is: (\d+)\n")


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    return small.form(tmp_path_factory.mktemp("needle"))


def task(form, **options):
    return NeedleTask(form, small.haystack(form), DEPTHS, **options)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_follows_the_sentence_before_its_depth(form, depth):
    question = task(form).ask(Cell("needle", 900, depth, 0))
    text = form.vocabulary.decode(question.context)
    found = NEEDLE.search(text)
    hay = text[: found.start()] + text[found.end() :]
    assert len(question.tokens) == 900 and hay in small.TEXT and len(found[2]) == 7
    ends = [0, *(m.end() for m in re.finditer(r"\.", hay))]
    place = int(len(hay) * depth / 100)
    expected = len(hay) if depth == 100 else max((end for end in ends if end <= place and end), default=place)
    assert found.start() == expected
    assert question.query == f"What is the special magic {found[1]} number?" and question.answers == (found[2],)


def test_the_prompt_is_lwms(form):
    question = task(form).ask(Cell("needle", 900, 30.0, 1))
    text = form.vocabulary.decode(question.tokens)
    assert text.startswith("You are a helpful assistant. USER: ") and text.endswith(
        f" {question.query} Don't give information outside the document or repeat your findings. Keep your response"
        " short and direct. ASSISTANT: "
    )


def test_a_question_depends_on_its_cell_and_the_seed_alone(form):
    cell = Cell("needle", 800, 30.0, 2)
    first = task(form).ask(cell)
    other = NeedleTask(form, small.haystack(form), (30.0,), per_cell=9)
    other.ask(Cell("needle", 800, 30.0, 1))
    assert other.ask(cell) == first == task(form).ask(cell)
    different = [
        task(form, seed=1).ask(cell),
        *(task(form).ask(cell._replace(**c)) for c in ({"index": 1}, {"depth": 0.0})),
    ]
    assert all(question.answers != first.answers for question in different)
    assert [cell.index for cell in task(form, per_cell=2).cells(800)] == [0, 1] * 3


def test_several_in_and_some_asked(form):
    question = task(form, needles=4, retrieve=2).ask(Cell("needle", 1500, 100.0, 0))
    text = form.vocabulary.decode(question.context)
    found = dict(NEEDLE.findall(text))
    assert len(found) == 4 and len(question.tokens) == 1500
    asked = re.fullmatch(r"What are the special magic numbers for (.+), and (.+)\?", question.query).groups()
    assert question.answers == tuple(found[city] for city in asked)
    assert text.endswith("\n") and any(text.endswith(f"{found[city]}\n") for city in asked)  # one lies at the depth
    assert task(form).score(question, f"It is {question.answers[0]}.") == 0.5
    one = task(form, needles=3).ask(Cell("needle", 900, 0.0, 0))
    assert re.fullmatch(r"What is the special magic number for .+\?", one.query)


@pytest.mark.parametrize("needles, retrieve", [(1, 2), (0, 1), (2, 0), (len(CITIES) + 1, 1)])
def test_numbers_that_do_not_fit(form, needles, retrieve):
    with pytest.raises(ValueError, match=f"retrieve {retrieve} of needles {needles}"):
        task(form, needles=needles, retrieve=retrieve)


def test_likelihood_asks_for_the_digits_alone(form):
    made = task(form, likelihood=True)
    question = made.ask(Cell("needle", 900, 30.0, 0))
    assert form.vocabulary.decode(question.after).endswith(" number is:")
    assert form.vocabulary.decode(made.expected(question)) == f" {question.answers[0]}"
    with pytest.raises(ValueError, match="score 'likelihood' is about one answer"):
        task(form, likelihood=True, needles=2, retrieve=2)


def test_the_models_own_template(form):
    asked = NeedleTask(Form(form.model, "chat"), small.haystack(form), DEPTHS).ask(Cell("needle", 900, 30.0, 0))
    assert len(asked.tokens) == 900
    assert asked.before[0] == 1 and 2 in asked.after and form.vocabulary.decode(asked.after).endswith("assistant\n")
    bare = NeedleTask(Form(form.model, "none"), small.haystack(form), DEPTHS).ask(Cell("needle", 900, 30.0, 0))
    assert bare.before == () and bare.query == asked.query


def test_no_room_and_a_haystack_that_is_too_short(form):
    with pytest.raises(ValueError, match="length 200 of needle: question and needles alone are"):
        task(form).ask(Cell("needle", 200, 0.0, 0))
    short = Haystack.of(["Too short."], form.vocabulary)
    with pytest.raises(
        ValueError, match="has 10 tokens and a prompt needs .* longer one with --haystack, or repeat it"
    ):
        NeedleTask(form, short, DEPTHS).ask(Cell("needle", 900, 0.0, 0))
    repeated = Haystack.of(["Too short."], form.vocabulary, repeat=True)
    question = NeedleTask(form, repeated, DEPTHS).ask(Cell("needle", 900, 0.0, 0))
    assert len(question.tokens) == 900 and "Too short.Too short." in form.vocabulary.decode(question.context)


def test_needles_keep_their_order_and_nothing_is_lost(form):
    ids = form.vocabulary.encode("A b. C d. E f. G h.")
    woven = insert_at(ids, [(60, [300]), (100, [301]), (0, [302]), (60, [303])], form.vocabulary)
    assert [i for i in woven if i < 300] == ids
    assert form.vocabulary.decode(woven[: woven.index(300)][1:]) == "A b. C d." and woven[-1] == 301
    assert woven[0] == 302 and woven.index(303) == woven.index(300) + 1


def test_haystacks_of_all_kinds(tmp_path):
    import gzip

    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"four"))
    (tmp_path / "d.png").write_bytes(b"\xff")
    assert read_texts(str(tmp_path)) == ["one", "two", "three", "four"]
    assert read_texts(str(tmp_path / "a.txt")) == ["one"] and len(read_texts(None)) == 4
    (tmp_path / "b.jsonl").write_text('{"txt": "two"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl line 1 has no 'text'"):
        read_texts(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        read_texts(str(tmp_path / "a.txt"))
    with pytest.raises(FileNotFoundError, match="no haystack at"):
        read_texts(str(tmp_path / "none"))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(str(tmp_path / "a.txt"))


def test_excerpts_are_spread(form):
    hay = small.haystack(form)
    starts = {tuple(hay.excerpt(5, np.random.default_rng(i))) for i in range(20)}
    assert len(starts) > 10 and hay.excerpt(len(hay.ids), np.random.default_rng(0)) == hay.ids.tolist()


def test_a_haystack_that_unpacks_without_end_is_cut_off(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr("ringjax.evaluation.haystack.MOST_TEXT", 1 << 16)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * (1 << 16)))
    assert len(read_texts(str(tmp_path / "a.txt.gz"))[0]) == 1 << 16
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * (1 << 22)))
    with pytest.raises(ValueError, match="a.txt.gz unpacks to more than 65536 bytes"):
        read_texts(str(tmp_path / "a.txt.gz"))
    for content in (gzip.compress(b"abc")[:-9] + b"\xff" * 20, b"\x1f\x8b\x08\x00" + b"\xff" * 30, b"\x1f\x8b"):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match="a.txt.gz is not UTF-8 text"):
            read_texts(str(tmp_path / "a.txt.gz"))
