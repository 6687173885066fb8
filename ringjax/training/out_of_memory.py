"""Out of memory: which arrays are the largest, in place of what the allocator says."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ringjax.training.arrays import flatten_named
from ringjax.training.task import TrainState

SHOWN = 5


class OutOfMemory(RuntimeError):
    """The memory of the devices (or the host's) did not suffice; `stage` is the part of the config that ran."""

    def __init__(self, message: str, stage: Any = None):
        super().__init__(message)
        self.stage = stage


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what JAX, its compiler or Python raises when memory does not suffice."""
    if isinstance(error, MemoryError):
        return True
    words = "RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "Ran out of memory", "std::bad_alloc"
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words)


@contextlib.contextmanager
def explained(stage: Any, state: TrainState) -> Iterator[None]:
    """Raises OutOfMemory with the largest arrays of `state` (abstract) in place of an allocator's error."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(describe(error, stage, state), stage) from error


def describe(error: BaseException, stage: Any, state: TrainState) -> str:
    """What the allocator said, and what is always there on each device."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    arrays = on_each_device(state)
    total = sum(size for _, _, size in arrays)
    largest = "; ".join(f"{name} {kind} {_size(size)}" for name, kind, size in arrays[:SHOWN])
    return (
        f"out of memory in stage {stage.name!r}: {said}\n"
        f"largest arrays on each device: {largest}; parameters and optimizer are {_size(total)} of it, the"
        " rest is gradients and activations"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def on_each_device(state: TrainState) -> list[tuple[str, str, int]]:
    """Name, "float32[2,256]" and bytes of each array of the state on one device, the largest first."""
    named = flatten_named({"params": state.params, "optimizer": state.optimizer, "frozen": state.frozen})
    found = []
    for name, leaf in named.items():
        shape = leaf.sharding.shard_shape(leaf.shape)
        kind = f"{leaf.dtype}[{','.join(map(str, shape))}]"
        found.append((name.removesuffix(".value"), kind, math.prod(shape) * np.dtype(leaf.dtype).itemsize))
    return sorted(found, key=lambda array: array[2], reverse=True)
