"""The quickstart's evaluation, on a run that has learned nothing."""

import numpy as np
import pytest
from PIL import Image

from ringjax.data import samples
from ringjax.evaluation import quickstart, quickstart_report
from ringjax.evaluation.digits import Captions, Drawings, classifier, draw_digits
from ringjax.evaluation.prose import ProseLoss, prose_loss
from ringjax.inference import Sampling
from ringjax.inference.trained import TrainedRun
from tests.tiny_run import tiny_run


def findings(right: float, loss: float) -> quickstart.Findings:
    images, labels = (array[:100] for array in samples.digits("heldout"))
    hits = np.arange(100) < 100 * right
    return quickstart.Findings(
        captions=Captions(images, ["a"] * 100, hits),
        drawings=Drawings(images, labels, np.where(hits, labels, 9 - labels), 0.97),
        prose=ProseLoss(loss, 3.6, 1000),
        beginning="It was",
        continuation=" a $ dark \ufffd night",
        seconds=1.0,
    )


def test_the_short_form_runs_and_says_so(capsys):
    run_dir = tiny_run()
    assert quickstart.main([str(run_dir), "--short"]) == 0
    said = capsys.readouterr().out
    assert "hardly trained" in said and "MISSED" not in said and str(run_dir / "samples.png") in said
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "Short form" in report and "bars do not count" in report and "Trained 2 steps of 2 × 64 tokens" in report
    with Image.open(run_dir / "samples.png") as picture:
        assert picture.size[0] > 1000


def test_a_missed_bar_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "evaluate", lambda run_dir, amounts: findings(right=0.89, loss=3.7))
    assert quickstart.main([str(tiny_run())]) == 1
    assert capsys.readouterr().out.count("MISSED") == 3
    report = (tiny_run() / "report.md").read_text(encoding="utf-8")
    assert "| 89.0% (89 of 100) | at least 90% | MISSED |" in report and "**Missed: held-out digits" in report


def test_bars():
    assert [bar.met for bar in findings(right=0.9, loss=3.59).bars] == [True, True, True]
    assert [bar.met for bar in findings(right=0.89, loss=3.6).bars] == [False, False, False]
    assert [bar.met for bar in findings(right=float(0), loss=float("nan")).bars] == [False, False, False]


def test_wrong_samples_are_drawn_red(tmp_path):
    red = []
    for right in (1.0, 0.5):
        with Image.open(quickstart_report.draw_samples(tmp_path, findings(right, 3.5))) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        red.append(np.sum((pixels[..., 0] > 180) & (pixels[..., 1] < 80)))
    assert red[0] == 0 and red[1] > 1000


def test_every_drawing_is_judged():
    run = TrainedRun.load(tiny_run())
    drawings = draw_digits(run, count=3, sampling=Sampling(seed=1))
    assert drawings.images.shape == (30, 28, 28) and drawings.labels.tolist() == [
        d for d in range(10) for _ in range(3)
    ]
    seen = classifier().predict(drawings.images.reshape(30, -1) / 255)
    np.testing.assert_array_equal(drawings.recognised, seen)
    assert 0.95 < drawings.classifier < 1


def test_prose_loss_counts_every_token_once():
    """An untrained model is about as good as chance, and the loss is over all targets of the held-out chapters."""
    run = TrainedRun.load(tiny_run())
    found = prose_loss(run, seq_len=512)
    documents = samples.prose_chapters("heldout")
    assert found.tokens == sum(len(run.tokenizer.encode(text)) + 1 for text in documents)
    assert found.model == pytest.approx(np.log(512), abs=0.1)
    assert 3.5 < found.bigram < 3.7
