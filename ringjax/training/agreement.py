"""Before anything runs: do all processes have the same versions, config and data, and if not, which host differs?

    each process    facts, or what is wrong with it    ->  process 0
    process 0       compares                           ->  a verdict, the same for all

A process that differs would else hang the others in their first collective, or train on something else in silence. The
facts go over the coordinator's key-value store, which needs no devices: a host that lacks some of its devices is found
too. Process 0 reads one value of each process and writes one.
"""

import collections
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from ringjax.training.coordinator import coordinator
from ringjax.training.load import to_plain
from ringjax.training.yaml_tree import ConfigError

PACKAGES = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "libtpu"
# Flags that name files of a host; the others decide which programs are made.
_LOCAL_FLAGS = "--xla_dump_", "--xla_gpu_per_fusion_autotune_cache_dir"
# A file of terabytes that is indexed for the first time keeps its process busy meanwhile.
PATIENCE_MS = 3_600_000
_SHOWN = 12
_rounds = collections.Counter[str]()

Facts = Mapping[str, str]


def require_same(what: str, facts: Callable[[], Facts]) -> None:
    """Compare the facts of all processes under the name `what`; every process calls it, in the same order.

    `facts` maps names to values, such as {"jax": "0.10.2"}; what it raises (ValueError, OSError, ImportError,
    NotImplementedError, RuntimeError) is this process's problem and ends all of them. Raises ConfigError on every
    process, which names the processes and hosts that differ and in what. A process that runs alone only sees its own
    errors.
    """
    found = coordinator()
    if found is None:
        facts()
        return
    client, index, count = found.client, found.index, found.count
    key = f"ringjax/agreement/{what}/{_rounds[what]}"
    _rounds[what] += 1
    client.key_value_set(f"{key}/{index}", json.dumps(_statement(facts)))
    if index == 0:
        statements = [json.loads(client.blocking_key_value_get(f"{key}/{i}", PATIENCE_MS)) for i in range(count)]
        client.key_value_set(f"{key}/verdict", json.dumps(verdict(what, statements)))
    problems = json.loads(client.blocking_key_value_get(f"{key}/verdict", PATIENCE_MS))
    if problems:
        raise ConfigError(problems)


def _statement(facts: Callable[[], Facts]) -> dict[str, Any]:
    host = socket.gethostname()
    try:
        return {"host": host, "facts": dict(facts())}
    except (ValueError, OSError, ImportError, NotImplementedError, RuntimeError) as error:
        return {"host": host, "problem": str(error) or type(error).__name__}


def verdict(what: str, statements: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each process that differs from most (from process 0 where none are most); empty where all agree."""
    problems = {found.get("problem") for found in statements}
    if len(problems) == 1 and None not in problems:
        return list(problems)  # a mistake that all share is no difference
    named = [f"process {index} on {found['host']}" for index, found in enumerate(statements)]
    failed = [f"{who}: {found['problem']}" for who, found in zip(named, statements) if "problem" in found]
    lines = failed or list(_differences(named, [found["facts"] for found in statements]))
    if not lines:
        return []
    more = [f"and {len(lines) - _SHOWN} more lines like these"] if len(lines) > _SHOWN else []
    first = f"the {len(statements)} processes cannot begin together ({what}): no step was made"
    return [first, *lines[:_SHOWN], *more]


def _differences(named: Sequence[str], facts: Sequence[Facts]) -> Iterator[str]:
    for name in dict.fromkeys(name for some in facts for name in some):
        values = [some.get(name, "not there") for some in facts]
        if len(set(values)) == 1:
            continue
        counts = collections.Counter(values)
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        for who, value in zip(named, values):
            if value != usual:
                others = f"on {counts[usual]} others" if counts[usual] > 1 else f"in {named[values.index(usual)]}"
                yield f"{who}: {name} is {_short(value)}, and {_short(usual)} {others}"


def _short(value: str) -> str:
    return value if len(value) <= 100 else f"{value[:97]}…"


def software() -> dict[str, str]:
    """Versions of what makes the programs, this package's code as a digest, and the flags of XLA."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_LOCAL_FLAGS)]
    return found | {"ringjax's code": _code(), "XLA_FLAGS": " ".join(sorted(flags))}


def _code() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def settings(config: Any, but: Sequence[str] = ("distributed",)) -> dict[str, str]:
    """The resolved config by dotted names, without the fields `but`, which are each process's own."""
    plain = {name: value for name, value in to_plain(config).items() if name not in but}
    return {f"config {name}": value for name, value in _leaves(plain, "")}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        for place, child in enumerate(value):
            yield from _leaves(child, f"{name}.{place}")
    else:
        yield name, yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n...")[0].strip()


def devices() -> dict[str, str]:
    """How many devices this process has, and of which kind."""
    local = jax.local_devices()
    return {"devices": f"{len(local)} × {local[0].device_kind}"}
