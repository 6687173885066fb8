"""The coordinator of several processes: its key-value store, which needs no devices.

`jax.process_index` would start the devices, which may be what fails, and there is no public way to the store (jax
0.12).
"""

from typing import Any, NamedTuple

import jax


class Coordinator(NamedTuple):
    """What this process knows of the others."""

    client: Any
    """Of the store: `key_value_set`, `blocking_key_value_get`, …"""
    address: str
    index: int
    """Of this process."""
    count: int
    """Of all processes."""


def coordinator() -> Coordinator | None:
    """The coordinator, None for a process alone."""
    if not jax.distributed.is_initialized():
        return None
    from jax._src.distributed import global_state as found

    if found.num_processes == 1:
        return None
    return Coordinator(found.client, found.coordinator_address, found.process_id, found.num_processes)
