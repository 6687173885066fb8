"""Two processes of four devices train like one of eight; only the first prints and writes."""

import signal

import numpy as np
import pytest

from tests.training.runs import curve, finish, free_port, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("one") / "run"
    finish(start(folder, cache=cache))
    return folder


def start_two(folder, cache, *overrides):
    port = free_port()
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    options = ("--mesh.simulated_devices", "4", *overrides)
    return [start(folder, *options, cache=cache / str(i), JAX_PROCESS_ID=str(i), **cluster) for i in range(2)]


@pytest.mark.parametrize("shape", ["2,1,1,4", "1,1,1,8"], ids=["rows apart", "a ring across"])
def test_two_processes_train_like_one(tmp_path, cache, one, shape):
    folder = tmp_path / "run"
    first, second = start_two(folder, cache, "--mesh.shape", shape)
    printed = finish(first)
    assert "2 process(es)" in printed and "done after step 24" in printed
    assert "loss" not in finish(second)
    found, expected = np.array(curve(folder)), np.array(curve(one))
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-5)
    # Sums over processes have another order; 24 steps of training let the last bits of gradients grow.
    np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=1e-4)


def test_processes_stop_together_and_one_goes_on(tmp_path, cache, one):
    folder = tmp_path / "run"
    processes = start_two(folder, cache, "--training.steps", "2000", "--optimizer.schedule", "constant")
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
