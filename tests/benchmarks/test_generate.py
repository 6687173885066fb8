"""`ringjax bench generate` on a tiny model: what is timed, what is said, what is refused."""

import json

import jax
import pytest

from ringjax.benchmarks import generate, transformers_peer
from ringjax.benchmarks.command import bench_generate
from ringjax.benchmarks.config import GenerateBench
from ringjax.benchmarks.generate_table import cells
from ringjax.training.utilisation import peak_bandwidth

TINY = dict(sizes=("debug",), prefill=(64,), contexts=(16, 64), new_tokens=3, repeats=2, dtype="float32")


def test_results(tmp_path, capsys):
    assert bench_generate(GenerateBench(**TINY, splits=(32, 64), output=str(tmp_path)), ["bench", "generate"])
    found = json.loads((tmp_path / "results.json").read_text())
    kinds = [(r["kind"], r["context"], len(r["seconds"])) for r in found["results"]]
    assert kinds == [("prefill", 64, 2), ("token", 64, 2), ("token", 16, 2)]
    # debug: 2 layers, width 256, 2 heads of 128; every weight but the table of 32000 words, and K and V.
    parameters = 2 * (4 * 256**2 + 3 * 256 * 256 + 2 * 256) + 32000 * 256 + 256
    assert [r["bytes_read"] for r in found["results"][1:]] == [
        4 * parameters + 4 * 2 * 2 * context * 256 // jax.device_count() for context in (64, 16)
    ]
    assert all(split["error"] < 1e-5 and split["xla"] > 0 for split in found["splits"])
    assert "| debug | writes after | 16 |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "splits.png").stat().st_size > 1000 and "writes after" in capsys.readouterr().out


def test_a_profile(tmp_path, capsys):
    folder = tmp_path / "profile"
    config = {**TINY, "contexts": (16,), "repeats": 1, "profile": str(folder), "output": str(tmp_path)}
    assert bench_generate(GenerateBench(**config), ["bench", "generate"])
    (found,) = json.loads((tmp_path / "results.json").read_text())["profiles"]
    assert (found["size"], found["context"]) == ("debug", 16) and list((folder / "debug").rglob("*.trace.json.gz"))
    # 17 tokens of two layers, each with seven matrices and the head after them: what is said is of one token.
    products = next(part for part in found["classes"] if part["name"] == "matmul")
    assert 0 < products["count"] <= 40 and 0 < products["ms"] < found["span"]
    page = (tmp_path / "results.md").read_text()
    assert "## debug: where a token's time goes after 16" in page and "| matmul |" in page
    assert "ms on a device" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    plain = generate.decode_attention
    monkeypatch.setattr(generate, "decode_attention", lambda *args, **options: 1.1 * plain(*args, **options))
    with pytest.raises(ArithmeticError, match="off the plain formula; it is not timed"):
        generate.run_splits(GenerateBench(**TINY, splits=(32,)), lambda split: None)


def test_a_peer_that_is_not_there(tmp_path):
    config = GenerateBench(**TINY, peers=("transformers",), peer_python=str(tmp_path / "no_python"))
    found = transformers_peer.run(config, {"debug": generate.model_config("debug", "float32")}, lambda message: None)
    assert [(p["size"], p["context"]) for p in found] == [("debug", 16), ("debug", 64)]
    assert all("no_python" in p["error"] for p in found)
    result = generate.Result("debug", "token", 16, (0.5,), 1, 1.0, None, 1, 0.25, None)
    assert "No such file" in cells(result, found)[8] and cells(result, [])[6] == "50.0 %"
    peer = {"size": "debug", "context": 16, "token": 1.5, "prefill": 1.0}
    assert cells(result, [peer])[8:] == ["1.50 s", "3.0×"]


@pytest.mark.parametrize("changes, message", [
    ({"sizes": ("2b",)}, "unknown model size '2b'"),
    ({"contexts": (65,)}, "contexts has 65, the longest prompt 64 tokens; give --prefill 65"),
    ({"new_tokens": 1}, "new_tokens is 1; it must be at least 2"),
    ({"top": 0}, "top is 0; it must be at least 1"),
    ({"chunk": 0}, "chunk is 0; it must be at least 1, or null"),
    ({"splits": (1,)}, "splits has 1; give 2 tokens or more"),
])  # fmt: skip
def test_options(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerateBench(**{**TINY, **changes})


def test_the_memorys_rate():
    assert peak_bandwidth("NVIDIA H100 80GB HBM3") == 3350e9 and peak_bandwidth("NVIDIA H200") == 4800e9
    assert peak_bandwidth("TPU v5p") == 2765e9 and peak_bandwidth("TPU v5 lite") == 819e9
    assert peak_bandwidth("cpu") is None
