"""Where the time of a profiled step went: by kind of kernel, by part of the model, by kernel."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ringjax.benchmarks import trace
from ringjax.benchmarks.table import markdown_table
from ringjax.benchmarks.trace import Span

# What a kernel does, by its name; the first that matches. `ring/rotate` and the like are names of scopes.
CLASSES = (
    ("collectives", r"nccl|all[-_]?reduce|all[-_]?gather|reduce[-_]?scatter|all[-_]?to[-_]?all|collective|send[-_]?recv"
                    r"|ppermute|memcpyp2p|^send|^recv|nvshmem"),
    ("attention", r"sdpa|flash|fmha|attention|splash|mosaic|dot_do_o|dq_to_16|pallas"),
    ("copies", r"memcpy|memset|^copy|^dynamic[-_]update[-_]slice|^dynamic[-_]slice"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|xmma|^dot|matmul|convolution|splitkreduce|wgmma|__xla_fp8"),
    ("fusions", r"."),
)  # fmt: skip
_CLASSES = [(name, re.compile(pattern, re.I)) for name, pattern in CLASSES]
# Parts of the model, innermost names first: the scopes that the library gives its code.
SCOPES = (
    "ring/rotate", "ring/attend", "ring/merge", "optimizer", "loss", "feed_forward", "attention", "embed",
)  # fmt: skip
# The instruction wraps others, whose kernels are listed themselves.
_WRAPPERS = re.compile(r"^(while|conditional|call)([.\-_]\d+)*$")


@dataclasses.dataclass(frozen=True)
class Part:
    """Time of some kernels, in milliseconds a device and call."""

    name: str
    ms: float
    count: float
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A profiled call; all times in milliseconds, the mean of the devices.

    `span` from the first kernel's start to the last one's end, `idle` of it with nothing running. Kernels on several
    streams overlap, so the parts may add up to more than `span`. `overlapped` is the share of the collectives' time
    that runs beside compute on other streams; a collective's time includes its wait for the other devices.
    """

    devices: int
    span: float
    idle: float
    classes: tuple[Part, ...]
    scopes: tuple[Part, ...]
    kernels: tuple[Part, ...]
    overlapped: float | None

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The tables as Markdown."""
        lines = [f"{self.span:.3f} ms on a device, {self.idle:.3f} ms of it idle.", ""]
        if self.overlapped is not None:
            lines[0] += f" {100 * self.overlapped:.0f} % of the collectives' time runs beside compute."
        share = lambda part: f"{100 * part.ms / self.span:.1f} %" if self.span else "–"  # noqa: E731
        for title, parts in (("kind", self.classes), ("part of the model", self.scopes)):
            if parts:
                body = [[part.name, f"{part.ms:.3f}", share(part), f"{part.count:.0f}"] for part in parts]
                lines += [*markdown_table((title, "ms", "of the time", "kernels"), body), ""]
        body = [[part.name, part.detail, f"{part.ms:.3f}", share(part), f"{part.count:.0f}"] for part in self.kernels]
        return [*lines, *markdown_table(("kernel", "what", "ms", "of the time", "times"), body), ""]


def profiled(
    folder: str | Path, call: Callable[[], Any], program: str, say: Callable[[str], None], *, top: int, calls: int = 1
) -> Profile | None:
    """Run `call` (which makes `calls` calls) under the profiler and summarise it; the trace stays in `folder`.

    `program` is the HLO text, which says where an instruction comes from. None, with a word, where the profiler wrote
    nothing that can be read: what was measured before stands.
    """
    trace.record(folder, call)
    try:
        return summarise(trace.read(folder), trace.op_names(program), top, calls)
    except (OSError, ValueError) as error:
        say(f"no summary of the profile: {error}")
        return None


def summarise(spans: Sequence[Span], op_names: dict[str, str], top: int = 25, calls: int = 1) -> Profile:
    """The profile of these spans; raises ValueError when there are none."""
    if not spans:
        raise ValueError("the trace shows no kernel of a device; was anything run while it was taken?")
    spans = [span for span in spans if not _WRAPPERS.match(span.name)] or list(spans)
    by_device = defaultdict(list)
    for span in spans:
        by_device[span.device].append(span)
    share = 1e-3 / len(by_device) / calls  # of a sum over devices and calls, in microseconds
    window = [(min(s.start for s in found), max(s.stop for s in found)) for found in by_device.values()]
    busy = sum(trace.length(_covered(found)) for found in by_device.values())
    names = {span: op_names.get(span.op, "") for span in set(spans)}
    return Profile(
        len(by_device),
        trace.length(window) * share,
        (trace.length(window) - busy) * share,
        _parts(spans, lambda span: kind_of(span.name, names[span]), share, calls),
        _parts(spans, lambda span: scope_of(names[span]), share, calls) if any(names.values()) else (),
        _kernels(spans, names, share, calls)[:top],
        overlapped(spans, names),
    )


def kind_of(name: str, op_name: str = "") -> str:
    """What a kernel does. Where its own name says nothing, the scope of the attention kernel says it."""
    found = next(kind for kind, pattern in _CLASSES if pattern.search(name))
    custom = re.search(r"custom[-_]call|triton|kernel", name, re.I)
    if found == "fusions" and custom and "ring/attend" in op_name and not re.search("fusion", name):
        return "attention"
    return found


def scope_of(op_name: str) -> str:
    """The part of the model that an instruction belongs to, and whether it runs forward, backward or again."""
    if not op_name:
        return "not named"
    # A transformation encloses the scope that follows: "jvp(ring/attend)/dot_general".
    path = f"/{re.sub('[()]', '/', op_name)}/"
    part = next((scope for scope in SCOPES if f"/{scope}/" in path), "other")
    if part == "optimizer":
        return part
    if "rematted_computation" in op_name:
        return f"{part}, again"
    return f"{part}, backward" if "transpose(" in op_name else f"{part}, forward"


def overlapped(spans: Sequence[Span], names: dict[Span, str]) -> float | None:
    """The share of the collectives' time in which another stream of the device computes; None without collectives."""
    by_device = defaultdict(lambda: ([], []))
    for span in spans:
        kind = kind_of(span.name, names.get(span, ""))
        if kind == "copies":  # neither: they compete with both
            continue
        by_device[span.device][kind == "collectives"].append(span)
    sending = sum(trace.length(_covered(sent)) for _, sent in by_device.values())
    if not sending:
        return None
    both = (trace.length(trace.intersection(_covered(work), _covered(sent))) for work, sent in by_device.values())
    return sum(both) / sending


def _covered(spans: Sequence[Span]) -> list[trace.Interval]:
    return trace.union((span.start, span.stop) for span in spans)


def _parts(spans: Sequence[Span], name_of: Callable[[Span], str], share: float, calls: int) -> tuple[Part, ...]:
    """The spans' own time, summed by name, the longest first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    devices = len({span.device for span in spans})
    for span in spans:
        found = sums[name_of(span)]
        found[0] += span.own * share
        found[1] += 1 / devices / calls
    parts = [Part(name, ms, count) for name, (ms, count) in sums.items()]
    return tuple(sorted(parts, key=lambda part: -part.ms))


def _kernels(spans: Sequence[Span], names: dict[Span, str], share: float, calls: int) -> tuple[Part, ...]:
    """By kernel, each with its kind and the scopes that it is called from."""
    what: dict[str, dict[str, None]] = defaultdict(dict)
    for span in spans:
        kind = kind_of(span.name, names[span])
        what[span.name][f"{kind}: {scope_of(names[span])}" if names[span] else kind] = None
    details = {name: ", ".join(list(found)[:2]) + (" …" if len(found) > 2 else "") for name, found in what.items()}
    parts = _parts(spans, lambda span: span.name, share, calls)
    return tuple(dataclasses.replace(part, name=part.name[:90], detail=details[part.name]) for part in parts)
