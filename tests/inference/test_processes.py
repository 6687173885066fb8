"""Several processes write and measure what one does; only the first prints and keeps files."""

import json

import numpy as np
import pytest

from tests.evaluation import small
from tests.training.runs import cluster, command, finish

pytestmark = pytest.mark.slow

DEVICES = 4
GENERATE = ("--prompt", "once upon", "--max_new_tokens", "10", "--temperature", "0.8", "--seed", "3")
# The sampler's own logits are those of one device to 1e-6: no token of this text is so close to another.
PERPLEXITY = ("--lengths", "128", "--rows", "2", "--buckets", "2", "--dtype", "float32", "--progress", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small.folder(path)
    (path / "hay.txt").write_text(small.TEXT)
    return path


def ringjax(count: int, cache, *arguments: str, code: int = 0) -> list[str]:
    """What each of `count` processes printed; Gloo's own lines left out."""
    options = ("--simulated_devices", str(DEVICES // count))
    processes = [
        command(*arguments, *options, cache=cache / f"{i} of {count}", **(variables if count > 1 else {}))
        for i, variables in enumerate(cluster(count))
    ]
    return [finish(process, code) for process in processes]


def text_of(printed: str) -> str:
    """The last line that was written, without what Gloo says of its connections."""
    return printed.rpartition("Expected number of connected peer ranks is : ")[2].lstrip("0123456789\n").rstrip("\n")


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def written(folder):
    return text_of(ringjax(1, folder / "cache", "generate", str(folder / "model"), *GENERATE)[0])


@pytest.mark.parametrize("count, mesh", [(2, "1,1,1,4"), (4, "1,1,2,2")])
def test_processes_write_the_same_text(folder, written, count, mesh):
    first, *others = ringjax(count, folder / "cache", "generate", str(folder / "model"), *GENERATE, "--mesh", mesh)
    assert first.replace("once upon", "", 1) != first
    assert written.removeprefix("once upon") and text_of(first).endswith(written.removeprefix("once upon"))
    assert not any(written[-4:] in printed for printed in others)


@pytest.mark.parametrize("count, mesh", [(2, "1,1,1,4"), (4, "2,1,1,2")])
def test_processes_measure_the_same_and_one_goes_on(folder, tmp_path, count, mesh):
    asked = ("eval", "perplexity", str(folder / "model"), "--haystack", str(folder / "hay.txt"), *PERPLEXITY)
    one, several = tmp_path / "one", tmp_path / "several"
    ringjax(1, folder / "cache", *asked, "--output", str(one))
    first, *others = ringjax(count, folder / "cache", *asked, "--output", str(several), "--mesh", mesh)
    assert str(several / "report.md") in first and not any("report.md" in printed for printed in others)
    found, expected = ([record["losses"] for record in results(where)] for where in (several, one))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Another number of processes has nothing left to ask.
    ringjax(1, folder / "cache", *asked, "--output", str(several))
    assert [record["losses"] for record in results(several)] == found


def test_processes_without_a_mesh_are_refused(folder):
    for printed in ringjax(2, folder / "cache", "generate", str(folder / "model"), *GENERATE, code=1):
        assert "2 processes and no mesh" in printed and "--mesh 1,1,1,-1" in printed


def test_another_prompt_on_one_host_is_named(folder):
    processes = [
        command(
            "generate", str(folder / "model"), "--prompt", f"prompt {i}", "--mesh", "1,1,1,2", "--simulated_devices",
            "1", cache=folder / "cache", **variables,
        )
        for i, variables in enumerate(cluster(2))
    ]  # fmt: skip
    for process in processes:
        assert "config prompt is prompt 1, and prompt 0 in process 0" in finish(process, code=2)
