"""A released any-to-any model is asked as the run that it comes from, about pictures in colour."""

import json

import pytest

from ringjax.evaluation.eval_command import run_eval
from ringjax.evaluation.vision_config import CaptionsConfig, DrawingsConfig, GalleryConfig, VideoNeedleConfig
from tests.data.test_tokenize_captions import pictures  # noqa: F401 (a fixture)
from tests.interop.test_release import folder  # noqa: F401 (a fixture)
from tests.training.test_codes import place  # noqa: F401 (a fixture)


def records(path):
    found = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()][1:]
    return [{k: v for k, v in record.items() if k not in ("seconds", "compiled")} for record in found]


def test_the_same_answers(place, folder, pictures, tmp_path):  # noqa: F811
    """Six pictures from files; the run's own image tokenizer encodes them, and decodes what is drawn."""
    data = (str(pictures / "captions.jsonl"),)
    options = {"data": data, "kinds": ("pictures",), "choices": 4, "progress": "none"}
    for name, model in (("run", place / "run"), ("released", folder)):
        run_eval(CaptionsConfig(str(model), output=str(tmp_path / name), **options))
        drawings = DrawingsConfig(str(model), output=str(tmp_path / f"{name}_drawn"), batch=3, **options)
        assert "| pictures | drawn | 6 |" in run_eval(drawings)
    assert records(tmp_path / "run") == records(tmp_path / "released") and len(records(tmp_path / "run")) == 6
    assert records(tmp_path / "run_drawn") == records(tmp_path / "released_drawn")
    said = run_eval(GalleryConfig(str(folder), output=str(tmp_path / "a.png"), data=data, pictures=2, clips=1, batch=2))
    assert said.splitlines()[1] == f"{tmp_path}/a_clips.webp: 3 frames"
    with pytest.raises(ValueError, match="length 65 is beyond the rows of 64 tokens"):
        run_eval(VideoNeedleConfig(str(folder), output=str(tmp_path / "video"), data=data, lengths=(65,)))
