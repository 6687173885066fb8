"""Several processes write and measure what one does; only the first prints and keeps files."""

import json
import time

import numpy as np
import pytest

from ringjax.exit_codes import ExitCode
from tests.evaluation import small
from tests.tiny_run import tiny_run
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


def test_processes_draw_and_judge_the_same_pictures(folder, tmp_path):
    """A run of digits: a drawing with guidance (two rows, so dp 2), then captions by likelihood."""
    run = str(tiny_run())
    drawing = ("generate", run, "--prompt", "seven", "--seed", "2")
    asked = ("eval", "captions", run, "--count", "3", "--choices", "3", "--progress", "none")
    found = {}
    for count, where in ((1, ()), (2, ("--mesh", "2,1,1,2"))):
        picture, output = tmp_path / f"{count}.png", tmp_path / f"captions{count}"
        said = ringjax(count, folder / "cache", *drawing, "--draw", str(picture), *where)
        assert str(picture) in said[0] and not any(str(picture) in printed for printed in said[1:])
        ringjax(count, folder / "cache", *asked, "--output", str(output), *where)
        found[count] = picture.read_bytes(), results(output)
    assert found[1][0] == found[2][0]
    for one, other in zip(found[1][1], found[2][1], strict=True):
        assert (one["text"], one["choices"], one["right"]) == (other["text"], other["choices"], other["right"])
        # The file has four digits after the point.
        np.testing.assert_allclose(one["log_likelihoods"], other["log_likelihoods"], rtol=1e-5, atol=1e-4)


def test_a_process_that_is_lost_is_named_by_the_others(folder, tmp_path):
    """One is killed before its first answer; the other does not wait for it forever."""
    asked = ("eval", "perplexity", str(folder / "model"), "--haystack", str(folder / "hay.txt"), "--lengths", "128")
    asked += ("--rows", "100000", "--buckets", "2", "--progress", "none", "--output", str(tmp_path / "out"))
    asked += ("--mesh", "1,1,1,2", "--simulated_devices", "1")
    processes = [command(*asked, cache=folder / "cache" / f"lost {i}", **v) for i, v in enumerate(cluster(2))]
    answers = tmp_path / "out" / "results.jsonl"
    deadline = time.monotonic() + 120
    while not answers.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[1].kill()
    printed = finish(processes[0], code=int(ExitCode.PEER_LOST))
    assert "process 1 (" in printed and "this is process 0 and cannot go on without it" in printed
    assert "on all hosts: it asks what has no answer yet" in printed
    processes[1].communicate()


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
