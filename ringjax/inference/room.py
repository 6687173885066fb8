"""Whether a cache fits into memory, said before it is allocated, and what would fit."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from ringjax.models.cache import CacheType
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.training import distributed

_AXES = (None, "batch", "sequence", "kv_heads", None)
# Of what is free; the rest is for the activations of a chunk and for logits.
_SHARE = 0.9
# Tokens of a device's share: what every layout and kernel can cut.
_MULTIPLE = 16
_POWERS = {"GiB": 30, "MiB": 20, "KiB": 10}


class Memory(NamedTuple):
    """Bytes of one device: what a program may use, and what is in use already, the weights among it."""

    limit: int
    used: int

    @property
    def free(self) -> int:
        """Bytes for a cache."""
        return int(_SHARE * max(0, self.limit - self.used))


def cache_bytes(
    config: ModelConfig, rows: int, tokens: int, parallel: Parallel, cache_type: CacheType | None = None
) -> int:
    """Of keys and values of all layers, on one device; `cache_type` as in `empty_cache`."""

    def count(*shape: int) -> int:
        if parallel.mesh is not None:
            shape = NamedSharding(parallel.mesh, parallel.spec_for(shape, *_AXES[: len(shape)])).shard_shape(shape)
        return math.prod(shape)

    shape = (2 * config.layers, rows, tokens, config.key_heads)
    if cache_type is None:
        return count(*shape, config.head_size) * config.compute_dtype.itemsize
    return count(*shape, config.head_size) + 4 * count(*shape)  # int8, and a float32 scale for each


def tokens_that_fit(
    config: ModelConfig, rows: int, parallel: Parallel, memory: Memory, cache_type: CacheType | None = None
) -> int:
    """The longest cache of `rows` rows that fits, in a length that can be had."""
    step = _MULTIPLE * parallel.ring_size
    return memory.free // cache_bytes(config, rows, step, parallel, cache_type) * step


def require_room(
    config: ModelConfig,
    rows: int,
    tokens: int,
    parallel: Parallel,
    *,
    option: str,
    cache_type: CacheType | None = None,
    memory: Memory | None = None,
) -> None:
    """Raises ValueError for a cache that cannot fit, saying what would; `option` is how a person asks for less.

    `memory` is that of a device (None: as it is now). Where that is not known, nothing is checked.
    """
    memory = memory or memory_now(parallel)
    taken = cache_bytes(config, rows, tokens, parallel, cache_type)
    if memory is None or taken <= memory.free:
        return
    fits = tokens_that_fit(config, rows, parallel, memory, cache_type)
    each = "" if rows == 1 else f" for each of {rows} rows"
    raise ValueError(
        f"a cache of {tokens} tokens{each} takes {_size(taken)} a device, and of the {_size(memory.limit)} there"
        f" {_size(memory.used)} are in use (the weights among them); {fits} tokens would fit: ask for less with"
        f" {option}, or cut the cache over more devices"
    )


def with_whole_weights(
    params: Any, config: ModelConfig, tokens: int, parallel: Parallel, cache_type: CacheType | None = None
) -> Parallel:
    """`parallel` with the weights whole along the ring, where they fit beside a cache of so many tokens: cut over it,
    all of them cross the devices for every token."""
    memory = memory_now(parallel) if parallel.ring_size > 1 else None
    if memory is None:
        return parallel
    whole = dataclasses.replace(parallel, cut_weights=False)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(whole.param_shardings(params)))
    weights = sum(math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in leaves)
    taken = weights + cache_bytes(config, 1, tokens, parallel, cache_type)
    return whole if taken <= memory.free else parallel


def comfortable(config: ModelConfig, parallel: Parallel, cache_type: CacheType | None = None) -> int | None:
    """Tokens of a conversation that fit however it grows: a cache is copied into a larger one, two are there then.

    None: the memory is not known, or a window keeps the cache short anyway.
    """
    memory = memory_now(parallel)
    if memory is None or config.window is not None:
        return None
    step = _MULTIPLE * parallel.ring_size
    return tokens_that_fit(config, 1, parallel, memory, cache_type) // 2 // step * step


def memory_now(parallel: Parallel) -> Memory | None:
    """The fullest of the devices; simulated devices share what the host has. None: not known.

    Where the mesh lies on several processes all of them call it, and find the same.
    """
    found = _own_memory(parallel)
    if parallel.mesh is None or jax.process_count() == 1:
        return found
    everywhere = distributed.gather_json(found)
    if any(memory is None for memory in everywhere):
        return None
    return min((Memory(*memory) for memory in everywhere), key=lambda memory: memory.free)


def _own_memory(parallel: Parallel) -> Memory | None:
    devices = [jax.local_devices()[0]] if parallel.mesh is None else list(parallel.mesh.local_devices)
    if devices[0].platform == "cpu":
        host = host_memory()
        return None if host is None else Memory(host.limit // len(devices), host.used // len(devices))
    stats = [device.memory_stats() or {} for device in devices]
    if any("bytes_limit" not in entry for entry in stats):
        return None
    known = (Memory(entry["bytes_limit"], entry.get("bytes_in_use", 0)) for entry in stats)
    return min(known, key=lambda memory: memory.free)


def host_memory(meminfo: Path = Path("/proc/meminfo")) -> Memory | None:
    """What the operating system says; what programs can get back from its buffers counts as free. None: not known."""
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
        if {"MemTotal", "MemAvailable"} <= kib.keys():
            return Memory(1024 * kib["MemTotal"], 1024 * (kib["MemTotal"] - kib["MemAvailable"]))
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" not in names:
        return None
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return Memory(page * pages, page * (pages - os.sysconf("SC_AVPHYS_PAGES")))


def _size(count: int) -> str:
    unit = next((u for u in ("GiB", "MiB") if count >= 2 ** _POWERS[u]), "KiB")
    return f"{count / 2 ** _POWERS[unit]:.1f} {unit}"
