"""Several processes: starting them, and the few things they must agree on."""

import functools
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringjax.training import peers
from ringjax.training.config import DistributedConfig

log = logging.getLogger(__name__)

# Rows over dp and fsdp, tokens over sp: how a batch lies on the mesh (micro-batches first).
BATCH_SPEC = PartitionSpec(None, ("dp", "fsdp"), "sp")


def start(config: DistributedConfig) -> None:
    """Join the other processes, if there are any; call before the first use of JAX's devices.

    Explicit settings (config or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID) come first, then the
    clusters that JAX detects itself: Slurm, Open MPI, Kubernetes, Cloud TPU.
    Raises ValueError when only a part of the explicit settings is given.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ.get
    coordinator = config.coordinator or env("JAX_COORDINATOR_ADDRESS")
    processes = _number("processes", config.processes, "JAX_NUM_PROCESSES")
    index = _number("process_index", config.process_index, "JAX_PROCESS_ID")
    given = {"coordinator": coordinator, "processes": processes, "process_index": index}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        if not 0 <= index < processes:
            raise ValueError(f"distributed.process_index {index} must be 0 to processes - 1 ({processes - 1})")
        with peers.joining(coordinator, index, config.start_seconds):
            jax.distributed.initialize(coordinator, processes, index, **_patience(config))
    elif config.detect and _cluster_detected():
        known = {"coordinator_address": coordinator} if coordinator else {}
        with peers.joining(coordinator, index, config.start_seconds):
            jax.distributed.initialize(**known, **_patience(config))
    elif len(missing) < len(given):
        raise ValueError(
            f"distributed: {', '.join(missing)} missing and no cluster was detected; give coordinator, processes and"
            " process_index, or none of them"
        )


def _patience(config: DistributedConfig) -> dict[str, int]:
    """JAX's own timeouts; its heartbeats come later than those of `ringjax.training.peers`, which say who is lost."""
    return {
        "initialization_timeout": config.start_seconds,
        "heartbeat_timeout_seconds": max(100, 2 * config.heartbeat_seconds),
    }


def _number(name: str, value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or text is None:
        return value
    if not text.isdigit():
        raise ValueError(f"environment variable {variable}={text!r} is not a number (distributed.{name})")
    return int(text)


def _cluster_detected() -> bool:
    """Whether JAX's own detection finds a cluster.

    `initialize()` without arguments raises where there is none, and there is no public way to ask first (jax 0.12).
    """
    try:
        from jax._src.clusters import ClusterEnv

        return any(env.is_env_present() for env in ClusterEnv._cluster_types if not env.opt_in_only_method)
    except (ImportError, AttributeError):
        log.warning("this version of JAX does not tell whether it detects a cluster; give distributed.coordinator")
        return False


def is_main() -> bool:
    """Whether this is process 0, the one that prints and writes metrics."""
    return jax.process_index() == 0


def gather_json(value: Any) -> list[Any]:
    """`value` of every process, in order, on every process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[: int(size)])) for row, size in zip(rows, sizes.ravel())]


def fetch(tree: Any) -> Any:
    """A tree of arrays as numpy arrays, whole on every process wherever their parts are; all processes call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_fetch, tree)


def _fetch(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def same_on_all(make: Callable[[], Any]) -> Any:
    """What process 0 makes (JSON), on every process; its error is raised on all of them."""
    result = None
    if is_main():
        try:
            result = {"value": make()}
        except Exception as error:
            if jax.process_count() == 1:
                raise
            result = {"error": f"{type(error).__name__}: {error}"}
    result = gather_json(result)[0]
    if "error" in result:
        raise RuntimeError(f"process 0 failed: {result['error']}")
    return result["value"]


def row_group(mesh: Mesh, rows: int) -> tuple[int, int]:
    """`(index, count)`: which of `count` equal groups of a batch's rows this process loads.

    Processes that hold other tokens of the same rows (sp over processes) load the same rows. Where a process's rows are
    not one block, it loads all of them: slower, never wrong.
    """
    sharding = NamedSharding(mesh, PartitionSpec(("dp", "fsdp")))
    places = [(device.process_index, index) for device, (index,) in sharding.devices_indices_map((rows,)).items()]
    return group_of(places, rows, jax.process_index())


def group_of(places: list[tuple[int, slice]], rows: int, process: int) -> tuple[int, int]:
    """`row_group` of a process, given which process each device belongs to and which rows it holds."""
    held: dict[int, set[tuple[int, int]]] = {}
    for owner, index in places:
        held.setdefault(owner, set()).add(index.indices(rows)[:2])
    blocks = {owner: (min(spans)[0], max(spans)[1]) for owner, spans in held.items()}
    size = rows // len(set(blocks.values()))
    start = blocks[process][0]
    aligned = all(stop - first == size and first % size == 0 for first, stop in blocks.values())
    return (start // size, rows // size) if aligned else (0, 1)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, accumulation: int, group: tuple[int, int]) -> dict:
    """Global arrays `[accumulation, rows, T]` from this process's rows `[accumulation · rows / groups, T]`."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {name: _place(np.asarray(rows), sharding, accumulation, group) for name, rows in batch.items()}


def _place(rows: np.ndarray, sharding: NamedSharding, accumulation: int, group: tuple[int, int]) -> jax.Array:
    index, count = group
    local = rows.reshape(accumulation, -1, rows.shape[-1])
    shape = (accumulation, local.shape[1] * count, rows.shape[-1])
    part = functools.partial(_part, local, shape[1], index * local.shape[1])
    return jax.make_array_from_callback(shape, sharding, part)


def _part(local: np.ndarray, all_rows: int, first: int, index: tuple[slice, ...]) -> np.ndarray:
    """The part of the global batch at `index`, from the local rows, which are `first`, first + 1, … of all."""
    micro, rows, tokens = index
    start, stop, _ = rows.indices(all_rows)
    return local[micro, start - first : stop - first, tokens]
