"""A run's folder is asked as a published model is: the same text, the same tokens, and what training has changed."""

import json

import numpy as np
import pytest

from ringjax.evaluation import eval_command, perplexity
from ringjax.evaluation.eval_command import run_eval
from ringjax.evaluation.eval_config import NeedleConfig, PerplexityConfig
from ringjax.evaluation.summary import summarise
from ringjax.inference.text_model import TextModel
from ringjax.interop.start import open_start
from ringjax.training.load import parse_config
from ringjax.training.loop import train
from tests.evaluation import small
from tests.tiny_run import tiny_run

CONFIG = """
init_from: {folder}
run_dir: {run}
model: {{dtype: float32, vision_codes: 64, vision_vocab_size: 66}}
data: {{sources: [{{path: "sample:prose"}}], vision_codes: 64, prefetch: 0, add_bos: false}}
training: {{steps: 1, seq_len: 128, batch_size: 2}}
optimizer: {{learning_rate: 1.0e-9}}
mesh: {{shape: "1,1,1,8"}}
logging: {{progress: none, plot: false}}
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A published model, and a run that began with it, has tables of pictures and has learned nothing yet."""
    path = tmp_path_factory.mktemp("pair")
    folder = small.folder(path)
    (path / "hay.txt").write_text("Crème brûlée “for two”. " + small.TEXT)
    run = train(parse_config(CONFIG.format(folder=folder, run=path / "run"), open_start=open_start), open_start)
    return folder, run, path / "hay.txt"


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][1:]


def test_perplexity_before_and_after(pair, tmp_path):
    base, run, text = pair
    found = {}
    for name, model in (("base", base), ("run", run)):
        config = PerplexityConfig(
            str(model), output=str(tmp_path / name), lengths=(96,), rows=9, haystack=str(text), dtype="float32",
            progress="none", buckets=4,
        )  # fmt: skip
        shown = run_eval(config)
        assert "| nats a token | nats a character | bits a byte |" in shown
        found[name] = records(tmp_path / name)
    for before, after in zip(found["base"], found["run"], strict=True):
        assert [before[n] for n in ("tokens", "bytes", "characters", "document")] == [
            after[n] for n in ("tokens", "bytes", "characters", "document")
        ]
        np.testing.assert_allclose(before["losses"], after["losses"], rtol=1e-4)
    (line,) = summarise(found["run"])
    nats, tokens, size = (sum(np.sum(record[n]) for record in found["run"]) for n in ("losses", "counts", "bytes"))
    np.testing.assert_allclose([line.token_loss, line.byte_bits], [nats / tokens, nats / size / np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(np.exp(line.token_loss), line.score, rtol=1e-6)
    assert line.character_loss > line.byte_bits * np.log(2)  # some characters have several bytes


def test_results_of_earlier_versions_say_nothing_of_bytes():
    old = {"part": "perplexity", "method": "exact", "length": 9, "losses": [2.0], "counts": [2], "tokens": 2}
    (line,) = summarise([old])
    assert line.token_loss == 1 and line.character_loss is None and line.byte_bits is None


def test_a_run_reads_its_begin_token_where_a_text_begins(tmp_path, monkeypatch):
    """`<s>` in the middle of a text is nothing that the run has seen; the context is that of its rows."""
    assert TextModel.load(tiny_run(), dtype="float32").vocabulary.bos_id == 1
    config = PerplexityConfig(str(tiny_run()), output=str(tmp_path), lengths=(48,), rows=2, progress="none")
    seen = []
    real = perplexity.cut_rows
    monkeypatch.setattr(eval_command, "cut_rows", lambda *a: seen.extend(real(*a)) or seen)
    run_eval(config)
    assert 0 < records(tmp_path)[0]["loss"] < 10
    assert seen[0].inputs[0] == 1 and len(seen[0].inputs) == len(seen[0].targets) + 1
    assert seen[1].inputs[0] == seen[0].targets[-1] and len(seen[1].inputs) == len(seen[1].targets)
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text().replace('"read_first": 1, ', "").replace(', "read_first": 1', ""))
    with pytest.raises(ValueError, match="read_first"):  # of a version that read none
        run_eval(config)
    with pytest.raises(ValueError, match="length 65 is beyond the model's context of 64 tokens"):
        run_eval(PerplexityConfig(str(tiny_run()), output=str(tmp_path), lengths=(65,), progress="none"))


def test_needles_in_a_run(pair, tmp_path):
    _, run, text = pair
    options = {"haystack": str(text), "dtype": "float32", "progress": "none", "allow_beyond": True}
    run_eval(NeedleConfig(str(run), output=str(tmp_path), lengths=(400,), depths=(50.0,), max_new_tokens=2, **options))
    assert records(tmp_path)[0]["tokens"] == 400
