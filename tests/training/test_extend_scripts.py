"""The scripts of context extension: documents that ask for facts, and the table of what was measured."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.loader import make_loader
from ringjax.data.tokenizers import load_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Documents for rows of 4,096 tokens, from a book of 300 short paragraphs."""
    folder = tmp_path_factory.mktemp("recall")
    text = "\n\n".join(f"Paragraph {i} says that nothing happened on that day, nor on the next." for i in range(300))
    (folder / "book.txt").write_text(text)
    (folder / "apart.txt").write_text("kept apart\n\n" * 50)
    target = folder / "recall.jsonl"
    count = script("recall_documents").write(folder, target, 4096, 20_000, "sample", ["apart"], seed=1)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == count >= 5
    return target, lines


def test_every_answer_is_in_its_document(made):
    _, lines = made
    tokenizer = load_tokenizer("sample")
    for line in lines:
        asked = [name for name in line if re.fullmatch(r"q\d+", name)]
        assert 2 <= len(asked) <= 24 and "kept apart" not in line["context"]
        for name in asked:
            thing, value = line[name], line["a" + name[1:]].strip()
            assert value in line["context"] and value not in thing
        text = "".join(line[name] for name in line if name != "fields")
        assert len(tokenizer.encode(text)) < 4096
        assert "magic" not in text  # not the needle's words


def test_only_answers_bear_loss_and_nothing_is_cut(made):
    path, lines = made
    data = DataConfig(sources=(SourceConfig(str(path)),), long_examples="refuse", shuffle=False, prefetch=0)
    batch = next(make_loader(data, seq_len=4096, batch_size=1))
    tokenizer = load_tokenizer("sample")
    runs = np.split(batch["targets"][0], np.flatnonzero(np.diff(batch["loss_weights"][0] > 0)) + 1)
    marks = np.split(batch["loss_weights"][0] > 0, np.flatnonzero(np.diff(batch["loss_weights"][0] > 0)) + 1)
    learned = [tokenizer.decode(ids.tolist()) for ids, mark in zip(runs, marks) if mark[0]]
    answers = {line[name] for line in lines for name in line if re.fullmatch(r"a\d+", name)}
    assert len(learned) >= 2 and set(learned) <= answers


def test_documents_are_the_same_every_time(made, tmp_path):
    target, _ = made
    script("recall_documents").write(target.parent, tmp_path / "again.jsonl", 4096, 20_000, "sample", ["apart"], seed=1)
    assert (tmp_path / "again.jsonl").read_bytes() == target.read_bytes()
    with pytest.raises(SystemExit, match="holds no .txt files but book, apart"):
        script("recall_documents").write(target.parent, tmp_path / "x", 4096, 1, "sample", ["book", "apart"], seed=1)


def test_the_table(tmp_path):
    def evaluation(name, **summary):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))

    line = lambda method, length, score: {"method": method, "length": length, "score": score}  # noqa: E731
    evaluation("full/128k_digits", table=[line("exact", 8000, 1.0), line("exact", 32000, 0.85)])
    evaluation("full/32k_digits", table=[line("exact", 32000, 0.95)])
    evaluation("before/digits", table=[line("ntk", 8000, 0.7), line("yarn", 8000, 0.6)])
    evaluation("full/32k_perplexity", loss_by_position=[
        {"method": "exact", "length": 32, "losses": [4.0, 2.0] * 8}])  # fmt: skip
    steps = [{"step": i, "stage_step": i, "stage": "32k", "loss": 3.0 - i, **({} if i == 1 else
             {"seconds": 2.0, "tokens_per_second": 100.0, "mfu": 0.25})} for i in (1, 2, 3)]  # fmt: skip
    (tmp_path / "full" / "run").mkdir()
    (tmp_path / "full" / "run" / "metrics.jsonl").write_text("\n".join(json.dumps(step) for step in steps))
    summary = script("extend_summary")
    assert summary.rows(tmp_path, "digits") == [
        ("untrained, ntk", {8000: 0.7}), ("untrained, yarn", {8000: 0.6}),
        ("full, after 32k", {32000: 0.95}), ("full, after 128k", {8000: 1.0, 32000: 0.85}),
    ]  # fmt: skip
    assert "| full, after 32k | – | 95% |" in summary.needles(tmp_path, "digits")
    assert "| full, after 32k | " + " | ".join(["3.000"] * 8) in summary.perplexity(tmp_path)
    assert "| full, 32k | 3 | 4 | 100 | 25.0 % |" in summary.trained(tmp_path)
    assert summary.needles(tmp_path, "multi") == ""
