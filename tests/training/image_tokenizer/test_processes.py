"""Two processes of four devices train a tokenizer like one of eight."""

import numpy as np
import pytest

from ringjax.training.metrics import read_metrics
from tests.data.picture_folder import picture_folder
from tests.training.image_tokenizer.tiny import CONFIG
from tests.training.runs import finish, free_port, start


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    sources = ("--data.sources", f"[{{path: {picture_folder(tmp_path / 'pictures', 40)}}}]")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one, *sources, cache=tmp_path / "cache", config=CONFIG))
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    options = (*sources, "--mesh.simulated_devices", "4", "--logging.progress", "plain")
    first, second = (
        start(two, *options, cache=tmp_path / str(i), config=CONFIG, JAX_PROCESS_ID=str(i), **cluster) for i in range(2)
    )
    assert "fingerprint" in finish(first) and "fingerprint" not in finish(second)
    found, expected = ([r for r in read_metrics(f / "metrics.jsonl") if "loss" in r] for f in (two, one))
    for key in ("loss", "usage", "perplexity"):
        np.testing.assert_allclose([r[key] for r in found], [r[key] for r in expected], rtol=2e-4, err_msg=key)
    evaluated = [[r["eval"] for r in read_metrics(f / "metrics.jsonl") if "eval" in r][-1] for f in (two, one)]
    (a,), (b,) = (list(results.values()) for results in evaluated)
    assert a["psnr"] == pytest.approx(b["psnr"], abs=0.05) and a["pictures"] == b["pictures"]
