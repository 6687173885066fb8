"""Starting processes, and which rows each of them loads."""


import jax
import numpy as np
import pytest

from ringjax.training import distributed
from ringjax.training.config import DistributedConfig
from ringjax.training.mesh import make_mesh


@pytest.fixture
def started(monkeypatch):
    """What `jax.distributed.initialize` was called with; the environment names no cluster."""
    calls = []
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(distributed, "_cluster_detected", lambda: False)
    return calls


# JAX's own heartbeats come later than ours, which name the process that is lost.
PATIENCE = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 120}


def test_alone_nothing_is_started(started):
    distributed.start(DistributedConfig())
    assert started == []


def test_a_detected_cluster_is_joined_unless_switched_off(started, monkeypatch):
    monkeypatch.setattr(distributed, "_cluster_detected", lambda: True)
    distributed.start(DistributedConfig(detect=False))
    assert started == []
    distributed.start(DistributedConfig())
    assert started == [((), PATIENCE)]


def test_detection_asks_jax(monkeypatch):
    assert distributed._cluster_detected() is False
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a")
    assert distributed._cluster_detected() is True


def test_explicit_settings_come_first(started, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    config = DistributedConfig(process_index=3, heartbeat_seconds=90, start_seconds=20)
    distributed.start(config)
    expected = {"initialization_timeout": 20, "heartbeat_timeout_seconds": 180}
    assert started == [(("host:1", 4, 3), expected)]


@pytest.mark.parametrize(
    "config, message",
    [
        (DistributedConfig(coordinator="host:1"), "processes, process_index missing and no cluster was detected"),
        (DistributedConfig("host:1", 2, 2), r"process_index 2 must be 0 to processes - 1 \(1\)"),
    ],
)
def test_incomplete_settings_are_explained(started, config, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(config)


def test_a_garbled_variable_is_named(started, monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='first' is not a number"):
        distributed.start(DistributedConfig())


@pytest.mark.parametrize(
    "shape, processes, expected",
    [
        ("8,1,1,1", 2, [(0, 2), (1, 2)]),  # rows apart
        ("1,1,1,8", 2, [(0, 1), (0, 1)]),  # a ring across processes: the same rows on both
        ("2,1,1,4", 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # both
        ("1,1,8,1", 2, [(0, 1), (0, 1)]),
    ],
)
def test_row_groups(shape, processes, expected):
    sharding = jax.sharding.NamedSharding(make_mesh(shape), jax.sharding.PartitionSpec(("dp", "fsdp")))
    per_process = 8 // processes
    places = [(device.id // per_process, index) for device, (index,) in sharding.devices_indices_map((16,)).items()]
    assert [distributed.group_of(places, 16, process) for process in range(processes)] == expected


def test_rows_that_are_no_block_are_all_loaded():
    """Process 0 holds the first and the last quarter: it reads everything, and so does every other."""
    quarters = [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16)]
    places = list(zip([0, 1, 1, 0], quarters))
    assert [distributed.group_of(places, 16, process) for process in (0, 1)] == [(0, 1), (0, 1)]


def test_parts_of_a_batch_come_from_the_rows_of_the_process():
    local = np.arange(2 * 4 * 6).reshape(2, 4, 6)  # 2 micro-batches of rows 4 … 7 of 8
    part = distributed._part(local, 8, 4, (slice(None), slice(6, 8), slice(2, 4)))
    np.testing.assert_array_equal(part, local[:, 2:4, 2:4])


def test_gathering_alone_gives_the_value_back():
    assert distributed.gather_json({"a": [1]}) == [{"a": [1]}]
    assert distributed.same_on_all(lambda: 5) == 5
