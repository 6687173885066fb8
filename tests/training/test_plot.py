"""loss.png is drawn from whatever metrics.jsonl holds."""

import json

import numpy as np
import pytest
from PIL import Image

from ringjax.training.plot import plot_loss, smooth


@pytest.mark.parametrize("count", [0, 1, 300])
def test_loss_is_drawn(tmp_path, count):
    records = [
        {"step": s, "stage": "a" if s < 100 else "b", "text_loss": 4 / s, "vision_loss": None if s % 2 else 5 / s}
        for s in range(1, count + 1)
    ] + [{"step": count, "eval": {"sample:prose": {"loss": 2.0, "text_loss": 2.0, "vision_loss": None}}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    picture = np.asarray(Image.open(plot_loss(tmp_path)).convert("RGB"))
    assert picture.shape == (600, 960, 3)
    blue = (picture[..., 2].astype(int) - picture[..., 0] > 60).sum()
    assert (blue > 500) == (count > 1)  # the line of the text loss is there when there is something to draw


def test_smoothing_is_a_running_mean_of_what_is_there():
    values = np.arange(200.0)
    smoothed = smooth(values)
    assert smoothed[0] == 0 and smoothed[1] == 0.5
    assert smoothed[-1] == values[-4:].mean()
