"""What a profile says, read without TensorBoard: the Chrome trace that `jax.profiler` writes beside its own format.

FOLDER/plugins/profile/<date>/<host>.trace.json.gz
    processes  "/device:GPU:0 …"      threads  "Stream #13(Compute)", …    one event a kernel or copy
               "/device:TPU:0 …"      threads  "XLA Ops", "Async XLA Ops"  one event an operation
               "/host:CPU"            threads of the CPU backend           events with an `hlo_op`
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

Interval = tuple[float, float]


class Span(NamedTuple):
    """Something that a device did: microseconds from the trace's beginning.

    `own` is its duration less what ran inside it on the same thread; `op` the name of the HLO instruction, if known.
    """

    device: str
    thread: str
    name: str
    start: float
    stop: float
    own: float
    op: str


def record(folder: str | Path, call: Callable[[], Any]) -> Path:
    """Profile one run of `call` (until its result is there) into `folder`, which is returned."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a trace holds a million events: none for Python's own
    with jax.profiler.trace(str(folder), profiler_options=options):
        jax.block_until_ready(call())
    return Path(folder)


def read(folder: str | Path) -> list[Span]:
    """The device's spans of the newest profile under `folder`.

    Raises FileNotFoundError where there is no trace, ValueError where a trace cannot be read.
    """
    found = sorted(Path(folder).glob("**/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no *.trace.json.gz under {folder}; the profiler wrote nothing there")
    newest = [path for path in found if path.parent == found[-1].parent]
    spans = []
    for path in newest:
        try:
            with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
                events = json.load(file).get("traceEvents", [])
        except (OSError, EOFError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a trace: {error}") from error
        host = path.name.removesuffix(".trace.json.gz")
        spans += spans_of(events, "" if len(newest) == 1 else f"{host} ")
    return spans


def spans_of(events: Iterable[dict[str, Any]], prefix: str = "") -> list[Span]:
    """The device's spans among the events of a Chrome trace; on the CPU those of HLO instructions."""
    processes, threads, whole = {}, {}, []
    for event in events:
        arguments = event.get("args") or {}
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event.get("pid")] = str(arguments.get("name", ""))
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event.get("pid"), event.get("tid")] = str(arguments.get("name", ""))
        elif event.get("ph") == "X":
            whole.append(event)
    on_device = {pid for pid, name in processes.items() if re.match(r"/device:(GPU|TPU)", name)}
    lines = _lines_to_read({key: name for key, name in threads.items() if key[0] in on_device})
    by_thread = defaultdict(list)
    for event in whole:
        key = event.get("pid"), event.get("tid")
        if key in lines or (not lines and key[0] not in on_device and "hlo_op" in (event.get("args") or {})):
            by_thread[key].append(event)
    spans = []
    for (process, thread), found in by_thread.items():
        device = prefix + (re.sub(r"^/|\s*\(.*", "", processes.get(process, "")) or "device")
        spans += _with_own_time(device, threads.get((process, thread), str(thread)), found)
    return spans


def _lines_to_read(threads: dict[tuple, str]) -> set[tuple]:
    """The threads that hold what ran; others show the same time again by module, step, scope or source line."""
    streams = {key for key, name in threads.items() if name.startswith("Stream")}
    return streams or {key for key, name in threads.items() if re.fullmatch(r"(Async )?XLA Ops", name)}


def _with_own_time(device: str, thread: str, events: list[dict[str, Any]]) -> list[Span]:
    """Spans in order; what a loop's event encloses counts for the events inside it and not for the loop too."""
    events = sorted(events, key=lambda event: (float(event.get("ts", 0)), -float(event.get("dur", 0))))
    inside, own, stack = [], [], []
    for index, event in enumerate(events):
        start, duration = float(event.get("ts", 0)), float(event.get("dur", 0))
        while stack and inside[stack[-1]][1] <= start:
            stack.pop()
        if stack:
            own[stack[-1]] -= min(duration, max(0.0, inside[stack[-1]][1] - start))
        inside.append((start, start + duration))
        own.append(duration)
        stack.append(index)
    return [
        Span(_device(device, event), thread, str(event.get("name", "?")), *times, max(0.0, mine), _op(event))
        for event, times, mine in zip(events, inside, own)
    ]


def _op(event: dict[str, Any]) -> str:
    return str((event.get("args") or {}).get("hlo_op", ""))


def _device(process: str, event: dict[str, Any]) -> str:
    """Devices have a process each, but for those of the CPU, which share one."""
    ordinal = (event.get("args") or {}).get("device_ordinal", 0)
    return f"{process} {ordinal}" if "CPU" in process else process


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals, ascending, that cover the same."""
    merged: list[list[float]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        elif stop > start:
            merged.append([start, stop])
    return [(start, stop) for start, stop in merged]


def length(intervals: Iterable[Interval]) -> float:
    """What disjoint intervals cover together."""
    return sum(stop - start for start, stop in intervals)


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """What two lists of disjoint, ascending intervals both cover."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            found.append((start, stop))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return found


def op_names(program: str) -> dict[str, str]:
    """Where each instruction of a compiled program's HLO text comes from: instruction -> "jit(f)/scope/…/operation"."""
    pattern = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name=\"([^\"]*)\"", re.M)
    return dict(pattern.findall(program))
