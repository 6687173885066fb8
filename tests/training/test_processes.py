"""Several processes train like one that has all of their devices; only the first prints and writes."""

import signal

import numpy as np
import pytest

from tests.training.runs import curve, finish, start, start_all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("one") / "run"
    finish(start(folder, cache=cache))
    return folder


@pytest.mark.parametrize(
    "count, shape, strategy",
    [
        (2, "2,1,1,4", "ring"),  # rows apart
        (2, "1,1,1,8", "ring"),  # a ring across
        (2, "1,1,1,8", "hybrid"),  # heads traded inside a process, a ring between them
        (2, "1,1,1,8", "two_level"),  # around inside a process, across meanwhile
        (4, "2,1,1,4", "ring"),  # both: each ring lies on two processes
    ],
)
def test_processes_train_like_one(tmp_path, cache, one, count, shape, strategy):
    folder = tmp_path / "run"
    first, *others = start_all(
        count, folder, "--mesh.shape", shape, "--mesh.strategy", strategy, cache=cache / shape / strategy
    )
    printed = finish(first)
    assert f"{count} process(es)" in printed and "done after step 24" in printed
    assert all("loss" not in finish(process) for process in others)
    found, expected = np.array(curve(folder)), np.array(curve(one))
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-5)
    # Sums over processes have another order, and training lets the last bits of gradients grow.
    np.testing.assert_allclose(found[:8, 2], expected[:8, 2], rtol=1e-5)
    np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=1e-3)


def test_fewer_and_fewer_processes_go_on_on_other_meshes(tmp_path, cache):
    """Four processes make eight steps, two the next eight, one the rest: the losses are those of one process."""
    constant = ("--optimizer.schedule", "constant", "--training.eval_every", "0")
    finish(start(tmp_path / "one", *constant, cache=cache))
    folder = tmp_path / "run"
    for count, shape, last in ((4, "2,1,1,4", 8), (2, "1,2,2,2", 16), (1, "1,1,1,8", 24)):
        options = (*constant, "--mesh.shape", shape, "--training.steps", str(last))
        printed = [finish(process) for process in start_all(count, folder, *options, cache=cache / shape)]
        assert last == 8 or f"going on after step {last - 8}" in printed[0]
    found, expected = np.array(curve(folder)), np.array(curve(tmp_path / "one"))
    np.testing.assert_array_equal(found[:, 0], np.arange(1, 25))
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-5)


def test_processes_stop_together_and_one_goes_on(tmp_path, cache, one):
    folder = tmp_path / "run"
    long = ("--training.steps", "2000", "--optimizer.schedule", "constant")
    processes = start_all(2, folder, *long, cache=cache)
    while processes[0].poll() is None and len(curve(folder)) < 4:
        pass
    processes[1].send_signal(signal.SIGTERM)
    assert "saved; the same command goes on" in finish(processes[0], code=75)
    finish(processes[1], code=75)
    done = curve(folder)[-1][0]
    last = str(done + 3)
    printed = finish(start(folder, "--training.steps", last, "--optimizer.schedule", "constant", cache=cache))
    assert f"going on after step {done}" in printed
    assert [step for step, *_ in curve(folder)] == list(range(1, done + 4))
