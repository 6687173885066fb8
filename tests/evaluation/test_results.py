"""results.jsonl: evaluations go on, cut lines are dropped, other evaluations are refused."""

import json

import pytest

from ringjax.evaluation.pictures import short
from ringjax.evaluation.question import Cell
from ringjax.evaluation.results import Results
from ringjax.evaluation.summary import grid, markdown, summarise

ASKED = {"evaluation": "needle", "seed": 0, "depths": (0, 50)}


def line(index, **changes):
    return {"method": "exact", **Cell("needle", 64, 50.0, index)._asdict(), "score": 1.0, "tokens": 64, "seconds": 2.0,
            "first_seconds": 1.0, "cache_bytes": 5, "peak_bytes": None, "compiled": False} | changes  # fmt: skip


def written(folder, count=3):
    with Results(folder, ASKED, {"device": "any"}) as results:
        for index in range(count):
            results.add(line(index, text='a "b"\n\N{LINE SEPARATOR}\N{GRINNING FACE}'))
    return results.path


def test_going_on(tmp_path):
    before = written(tmp_path).read_bytes()
    with Results(tmp_path, ASKED, {"device": "another"}) as results:
        assert [results.has("exact", Cell("needle", 64, 50.0, i)) for i in range(4)] == [True] * 3 + [False]
        assert not results.has("window", Cell("needle", 64, 50.0, 0)) and not results.dropped
        results.add(line(3))
    assert results.path.read_bytes().startswith(before) and len(results.records) == 4
    assert json.loads(before.split(b"\n")[0])["asked"] == {**ASKED, "depths": [0, 50]}


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_a_cut_line_is_dropped(tmp_path, keep):
    path = written(tmp_path)
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:keep])
    with Results(tmp_path, ASKED, {}) as results:
        assert results.dropped and len(results.records) == 2
        results.add(line(2))
    with Results(tmp_path, ASKED, {}) as results:
        assert len(results.records) == 3 and not results.dropped


def test_a_cut_first_line_is_begun_anew(tmp_path):
    path = written(tmp_path, 0)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        with Results(tmp_path, ASKED, {"device": "any"}) as results:
            assert results.records == []
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "first, message",
    [
        ('{"format": 1, "asked": {"evaluation": "ruler"}}', "of another evaluation: depths is None there and"),
        ('{"format": 2, "asked": {}}', "no results file of this version; give another --output, or remove it"),
        ("something else", "no results file of this version"),
        ("[]", "no results file of this version"),
    ],
)
def test_other_files(tmp_path, first, message):
    (tmp_path / "results.jsonl").write_text(first + "\n")
    with pytest.raises(ValueError, match=message):
        Results(tmp_path, ASKED, {})
    assert (tmp_path / "results.jsonl").read_text() == first + "\n"


def test_another_seed_is_another_evaluation(tmp_path):
    written(tmp_path)
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        Results(tmp_path, {**ASKED, "seed": 1}, {})


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = written(tmp_path)
    lines = path.read_text().split("\n")
    for damage in ('{"method": "exact"}', lines[2][:30], "7"):
        path.write_text("\n".join([*lines[:2], damage, *lines[3:]]))
        with pytest.raises(ValueError, match="line 3 is damaged; remove that line and run again"):
            Results(tmp_path, ASKED, {})


def test_lengths_in_short():
    assert [short(n) for n in (900, 32000, 1024, 8064, 16384, 1 << 20)] == ["900", "32000", "1K", "7.88K", "16K", "1M"]


def test_the_table():
    records = [line(0, seconds=90.0, compiled=True), line(1, score=0.0), line(0, length=32, method="window")]
    first, second = summarise(records)
    assert (first.length, first.method, second.score, second.count) == (32, "window", 0.5, 2)
    assert second.seconds == 2.0 and second.first_seconds == 1.0 and second.cache_bytes == 5
    table = markdown([first, second]).splitlines()
    assert table[3] == "| needle | 64 | exact | 50% | 2 | 64 | 1 | 2 | 0.0 |" and "peak" not in table[0]
    only = summarise([line(0, compiled=True, peak_bytes=7_000_000)])
    assert only[0].seconds == 2.0 and markdown(only).splitlines()[2].endswith(" 7.0 |")
    rows, lengths, values = grid([*records, line(0, depth=0.0)], "depth")
    assert (
        rows == [0.0, 50.0]
        and lengths == [32, 64]
        and values[1].tolist() == [1.0, 0.5]
        and values[0, 0] != values[0, 0]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"length": []},
        {"length": 2**60},
        {"depth": True},
        {"method": None},
        {"score": "1"},
        {"score": float("nan")},
        {"score": 10**400},
        {"seconds": None},
        {"losses": [1.0], "counts": [1]},
        {"part": "perplexity"},
        {"cache_bytes": {}},
        {"depth": "a"},
        {"part": "perplexity", "losses": [1.0], "counts": []},
        {"part": "perplexity", "losses": [1.0], "counts": [0]},
    ],
)
def test_lines_of_other_kinds_are_damaged(tmp_path, changes):
    path = written(tmp_path)
    path.write_text(path.read_text() + json.dumps(line(3, **changes)) + "\n")
    with pytest.raises(ValueError, match="results.jsonl line 5 is damaged"):
        Results(tmp_path, ASKED, {})


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "9" * 5000], ids=["nested", "list", "digits"])
def test_lines_that_are_no_records(tmp_path, text):
    path = written(tmp_path)
    whole = path.read_text()
    path.write_text(whole + text + "\n")
    with pytest.raises(ValueError, match="results.jsonl line 5 is damaged"):
        Results(tmp_path, ASKED, {})
    path.write_text(text + "\n" + whole)
    with pytest.raises(ValueError, match="is no results file of this version"):
        Results(tmp_path, ASKED, {})


def test_a_record_without_tokens_has_none_in_the_table(tmp_path):
    records = [{name: x for name, x in line(0).items() if name not in ("tokens", "cache_bytes")}]
    assert "tokens read" not in markdown(summarise(records)) and "100%" in markdown(summarise(records))
