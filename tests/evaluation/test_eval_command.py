"""`ringjax eval`: what is right is scored right, runs that stop go on, and what cannot be asked is refused at once."""

import dataclasses
import json
import re

import pytest

from ringjax import cli
from ringjax.evaluation import eval_command, run_questions
from ringjax.evaluation.eval_command import run_eval
from ringjax.evaluation.eval_config import NeedleConfig, PerplexityConfig, RulerConfig
from ringjax.evaluation.reading import GREEDY, Reading, answer, force
from ringjax.inference.text_model import TextModel
from ringjax.models.transformer import unstacked
from tests.evaluation import small

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The options that every evaluation here has: a tiny model and a short text."""
    folder = tmp_path_factory.mktemp("eval")
    text = folder / "hay.txt"
    text.write_text(small.TEXT)
    return {"model": str(small.folder(folder)), "haystack": str(text), "dtype": "float32", "progress": "none"}


def needle(given, folder, **changes):
    options = {"lengths": (400, 500), "depths": (0.0, 50.0), "max_new_tokens": 3}
    return NeedleConfig(output=str(folder), **given | options | changes)


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][1:]


def timeless(found):
    return [{k: v for k, v in record.items() if "seconds" not in k and k != "compiled"} for record in found]


class Perfect:
    """Reads the prompt as a person would."""

    def read(self, question, enough):
        text = " ".join(question.answers)
        assert enough(text) and not enough("nothing")
        return Reading(text, len(question.tokens), 0.1, 0.2, 8)


class Blind:
    def read(self, question, enough):
        return Reading("I see nothing.", len(question.tokens), 0.1, 0.2, 8)


@pytest.mark.parametrize("reader, score", [(Perfect, "100%"), (Blind, "0%")])
def test_from_blind_to_perfect(given, tmp_path, monkeypatch, reader, score):
    monkeypatch.setattr("ringjax.evaluation.methods.Methods.open", lambda *_: reader())
    shown = run_eval(needle(given, tmp_path / "needle", needles=3, retrieve=2, lengths=(900,)))
    shown += run_eval(RulerConfig(output=str(tmp_path / "ruler"), lengths=(4000,), per_task=1, **given))
    rows = [row.split(" | ") for row in shown.splitlines() if row.startswith("| ") and "---" not in row]
    scores = [row[rows[0].index("score")] for row in rows if "score" not in row]
    assert scores == [score] * 13  # the needles and RULER's twelve
    page = (tmp_path / "ruler" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and ("I see nothing." in page) == (score == "0%")


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """An evaluation that nobody has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run_eval(needle(given, folder))
    return folder


def test_what_is_left_behind(whole):
    found = records(whole)
    assert [(r["length"], r["depth"]) for r in found] == [(n, d) for n in (400, 500) for d in (0.0, 50.0)]
    assert all(r["tokens"] == r["prompt_tokens"] == r["length"] and r["new_tokens"] <= 3 for r in found)
    assert [r["compiled"] for r in found] == [True, False] * 2 and found[0]["cache_bytes"] > 0
    for name in ("report.html", "report.md", "summary.json", "heat_map.png", "accuracy.png"):
        assert (whole / name).stat().st_size > 200
    assert (whole / "report.html").read_text().count("data:image/png;base64,") == 2


def test_an_interrupted_evaluation_goes_on(given, whole, tmp_path, monkeypatch):
    asked = []
    real = run_questions.ask

    def interrupted(*arguments):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(run_questions, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_eval(needle(given, tmp_path))
    monkeypatch.setattr(run_questions, "ask", lambda *arguments: asked.append(arguments) or real(*arguments))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # and the last line was cut, too
    run_eval(needle(given, tmp_path))
    assert len(asked) == 3 + 2 and timeless(records(tmp_path)) == timeless(records(whole))
    run_eval(needle(given, tmp_path, per_cell=2, lengths=(400,)))  # a grid can grow
    assert len(asked) == 5 + 2
    with pytest.raises(ValueError, match="is of another evaluation: digits is 7 there and 5 here"):
        run_eval(needle(given, tmp_path, digits=5))


def test_a_mesh_changes_no_answer(given, whole, tmp_path):
    run_eval(needle(given, tmp_path, mesh="1,2,1,4", lengths=(400,)))
    assert [r["text"] for r in records(tmp_path)] == [r["text"] for r in records(whole)[:2]]


@pytest.mark.slow
def test_layers_apart_change_no_answer(given, tmp_path, monkeypatch):
    """As models are on GPUs."""
    found = []
    for name, load in (("together", lambda model: model), ("apart", unstacked)):
        monkeypatch.setattr("ringjax.inference.text_model.for_decoding", load)
        options = {"method": ("exact", "window", "sinks", "ntk"), "window": 64, "rope_factor": 2.0}
        run_eval(needle(given, tmp_path / name, lengths=(500,), **options))
        options = given | options | {"method": ("window", "sinks")}
        run_eval(
            PerplexityConfig(
                output=str(tmp_path / f"{name} rows"), lengths=(96,), rows=2, **options | {"rope_factor": None}
            )
        )
        losses = [record["loss"] for record in records(tmp_path / f"{name} rows")]
        found.append(([record["text"] for record in records(tmp_path / name)], losses))
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_likelihood(given, tmp_path):
    """Teacher forcing after a prompt that ends where the digits begin."""
    run_eval(needle(given, tmp_path, score="likelihood", lengths=(500,)))
    for record in records(tmp_path):
        expected = f" {record['answers'][0]}"
        assert len(record["text"]) <= len(expected) and 0 <= record["right"] < 1 and record["score"] == 0


def test_teacher_forcing_is_greedy_decoding_as_long_as_it_is_right(given):
    model = TextModel.load(given["model"], dtype="float32")
    ids = model.vocabulary.encode("How many sheep?")
    session = model.session(64)
    tokens = list(session.generate(ids, max_new_tokens=5, sampling=GREEDY))
    assert force(model, session, ids, tokens).extra["right"] == 1
    wrong = [tokens[0], (tokens[1] + 1) % 256, *tokens[2:]]
    assert force(model, session, ids, wrong[:2]).extra["right"] == 0.5
    stopped = answer(model, session, ids, 5, lambda text: True)
    assert stopped.extra["new_tokens"] == 1


@pytest.mark.parametrize(
    "methods",
    [
        ("exact", "window", "flat"),
        pytest.param(("exact", "window", "sinks", "flat", "hnsw", "lsh"), marks=SLOW),
    ],
)
def test_methods_are_asked_the_same(given, tmp_path, methods):
    pytest.importorskip("faiss")
    options = {"window": 64, "chunk_tokens": 64, "overlap": 16, "top": 2}
    shown = run_eval(needle(given, tmp_path, method=methods, lengths=(600,), **options))
    found = records(tmp_path)
    by_method = {m: [r["answers"] for r in found if r["method"] == m] for m in methods}
    assert all(answers == by_method["exact"] and len(answers) == 2 for answers in by_method.values())
    read = {r["method"]: r["tokens"] for r in found}
    assert read["exact"] == read["window"] == 600 and read["flat"] < 500
    assert all(f" {method} |" in shown for method in methods)
    texts = {m: [r["text"] for r in found if r["method"] == m] for m in methods}
    assert texts["exact"] != texts["window"]


def test_rope_is_stretched(given, tmp_path):
    config = {"lengths": (2 * small.CONTEXT,), "rows": 1, "output": str(tmp_path / "p"), "haystack": None}
    config = PerplexityConfig(**given | config)
    with pytest.raises(ValueError, match=r"length 8192 is beyond the model's context of 4096 tokens \(method exact\)"):
        run_eval(config)
    for changes, expected in (
        ({"method": ("ntk",)}, ("rope_theta", 10000 * 2 ** (4 / 2))),
        ({"method": ("yarn",)}, ("rope_scaling", "yarn")),
        ({"rope_scaling": "linear", "rope_factor": 2.0}, ("rope_scaling", "linear")),
        ({"rope_theta": 5e4}, ("rope_theta", 5e4)),
        ({"method": ("window",)}, ("window", 1024)),
        ({"allow_beyond": True}, ("rope_theta", 10000)),
    ):
        changed = dataclasses.replace(config, **changes)
        methods = eval_command._open_model(changed)
        methods.check(changed.method[0], 8192)
        model = methods.model_for(changed.method[0], 8192).model.config
        value = getattr(model, expected[0])
        assert getattr(value, "kind", value) == pytest.approx(expected[1]) if expected[0] != "rope_scaling" else (
            value.kind == expected[1] and value.factor == 2
        )  # fmt: skip
    with pytest.raises(ValueError, match="beyond the model's context of 8192"):
        eval_command._open_model(dataclasses.replace(config, rope_scaling="yarn", rope_factor=2.0)).check("exact", 9000)


def test_perplexity_goes_on(given, tmp_path):
    options = given | {"method": ("exact", "window"), "window": 8}
    config = PerplexityConfig(output=str(tmp_path), lengths=(48,), rows=3, buckets=4, **options)
    shown = run_eval(config)
    first = records(tmp_path)
    assert len(first) == 6 and re.search(r"\| perplexity \| 48 \| exact \|( [\d.]+ \|){4} 3 \| 48 \|", shown)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    run_eval(config)
    assert timeless(records(tmp_path)) == timeless(first) and (tmp_path / "loss.png").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["loss_by_position"]) == 2 and len(summary["loss_by_position"][0]["losses"]) == 4


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (NeedleConfig, {"lengths": ()}, "lengths .* must be numbers of at least 2"),
        (NeedleConfig, {"lengths": (64, 64)}, "lengths 64 64: each once"),
        (NeedleConfig, {"method": ()}, "name at least one"),
        (NeedleConfig, {"depths": (120,)}, "must be percents"),
        (NeedleConfig, {"per_cell": 0}, "per_cell 0 must be at least 1"),
        (NeedleConfig, {"digits": 0}, "digits 0 must be"),
        (NeedleConfig, {"max_new_tokens": 0}, "max_new_tokens 0"),
        (NeedleConfig, {"overlap": 128}, "overlap 128 must be 0 or more and below"),
        (NeedleConfig, {"window": 0}, "window 0"),
        (NeedleConfig, {"sinks": -1}, "sinks -1"),
        (NeedleConfig, {"mesh": "1,2"}, "mesh shape '1,2' must be four numbers"),
        (NeedleConfig, {"rope_scaling": "yarn"}, "rope_scaling yarn needs --rope_factor"),
        (NeedleConfig, {"rope_factor": 2.0}, "says how far, not how"),
        (NeedleConfig, {"method": ("yarn",), "rope_theta": 1e6}, "method yarn changes RoPE itself"),
        (RulerConfig, {"tasks": ("niah",)}, "task 'niah' is unknown; there are niah_single_1"),
        (RulerConfig, {"per_task": 0}, "per_task of at least 1"),
        (PerplexityConfig, {"method": ("flat",)}, "retrieval answers questions"),
        (PerplexityConfig, {"buckets": 0}, "buckets 0"),
        (PerplexityConfig, {"rows": 0}, "rows 0"),
    ],
)
def test_options_that_cannot_be(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind("model", **options)


def test_the_command_line(given, tmp_path, capsys):
    options = ["--haystack", given["haystack"], "--dtype", "float32", "--output", str(tmp_path)]
    asked = ["--lengths", "400", "--depths", "50", "--max_new_tokens", "2", "--progress", "plain"]
    assert cli.main(["eval", "needle", given["model"], *options, *asked]) == 0
    shown = capsys.readouterr().out
    assert "1/1  exact needle 400 50 %  score 0.00  left 0:00" in shown and str(tmp_path / "report.html") in shown
    for arguments, message in (
        (["needles", given["model"]], "unknown evaluation 'needles'; did you mean 'needle'?"),
        (["needle", "--lengths", "400", given["model"]], "takes one MODEL before its options, not none"),
        (["needle", "nowhere"], "no model at nowhere"),
        (["needle", given["model"], *options, "--lengths", "5000"], "is beyond the model's context of 4096 tokens"),
        (["needle", given["model"], *options, "--lengths", "100"], "question and needles alone are"),
        (["needle", given["model"], *options, *asked, "--seed", "3"], "seed is 0 there and 3 here"),
        (["needle", given["model"], "--haystack", "nowhere"], "no haystack at nowhere"),
        (["needle", given["model"], "--method", "exakt"], "exakt"),
        (["needle", given["model"], "--depth", "3"], "did you mean 'depths'"),
        (["ruler", given["model"], "--qa", "nowhere", "--output", str(tmp_path / "r")], "nowhere"),
    ):
        assert cli.main(["eval", *arguments]) != 0, arguments
        assert message in capsys.readouterr().err
    assert cli.main(["eval"]) == 2 and cli.main(["eval", "perplexity", "--help"]) == 0
    assert "--buckets" in capsys.readouterr().out
    (tmp_path / "short.txt").write_text("Too short.")
    short = ["--haystack", str(tmp_path / "short.txt"), "--output", str(tmp_path / "s"), *asked]
    assert cli.main(["eval", "needle", given["model"], *short]) == 1
    assert "give a longer one with --haystack, or repeat it with --repeat_haystack true" in capsys.readouterr().err
    assert cli.main(["eval", "needle", given["model"], *short, "--repeat_haystack", "true"]) == 0
