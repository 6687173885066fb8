"""`--bench.compare`: every variant with every other, counted in tokens that are no padding."""

import json
import statistics

import pytest

from ringjax.benchmarks import train
from ringjax.benchmarks.compare import combinations, label
from ringjax.training import utilisation
from tests.benchmarks.test_train import config, run  # noqa: F401 (a fixture)


def test_each_with_each():
    assert combinations(None) == [()]
    found = combinations("data.packing=masked,pad mesh.layout=striped,contiguous")
    assert [label(variant) for variant in found] == [
        "packing masked, layout striped", "packing masked, layout contiguous", "packing pad, layout striped",
        "packing pad, layout contiguous",
    ]  # fmt: skip
    assert found[2] == (("data.packing", "pad"), ("mesh.layout", "striped"))


@pytest.mark.parametrize("text", ["packing=masked,pad", "data.packing", "data.packing=masked", "data.packing=a,,b"])
def test_what_compares_nothing_is_refused(text):
    with pytest.raises(ValueError, match="must be section.key=value,value"):
        combinations(text)


def test_a_key_named_twice_is_refused():
    with pytest.raises(ValueError, match="names a key twice"):
        combinations("data.packing=masked,pad data.packing=pad,masked")


def test_padding_is_told_from_tokens(capsys, config, tmp_path, monkeypatch):  # noqa: F811
    measured = train._Steps.run
    # A device of 1 GFLOP/s on which every step takes as long.
    monkeypatch.setattr(utilisation, "_PEAKS", (("cpu", 1e9),))
    monkeypatch.setattr(train._Steps, "run", lambda *given: [0.25] * len(measured(*given)))
    options = ["--bench.compare", "data.packing=masked,pad", "--bench.steps", "2", "--bench.warmup", "1"]
    only = ["--data.sources", '[{path: "sample:digits"}]', "--training.seq_len", "96"]
    code, out, err = run(capsys, config, *options, *only, "--bench.output", str(tmp_path / "results"))
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    packed, padded = results["packing masked"], results["packing pad"]
    assert packed["used"] > 0.8 and 0.05 < padded["used"] < 0.3, "a digit has about twenty tokens of 96"
    for result in (packed, padded):
        assert result["tokens_per_second"] == pytest.approx(result["used"] * result["rows"] * result["tokens"] / 0.25)
        assert len(result["flops"]) == 2
        assert result["flops_per_second"] == pytest.approx(statistics.median(result["flops"]) / 0.25)
        assert result["mfu"] == pytest.approx(result["flops_per_second"] / 1e9 / 8)
    assert 0 < padded["mfu"] < 0.4 * packed["mfu"]
    assert "| variant |" in out and "packing pad" in (tmp_path / "results" / "results.md").read_text()
    code, _, err = run(capsys, config, *options, "--bench.profile", str(tmp_path / "profile"))
    assert code == 2 and "compare and profile" in err
