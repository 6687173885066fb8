"""A line of the results of `ringjax bench attention`."""

import dataclasses
from typing import Any

from ringjax.benchmarks.programs import Program, Way
from ringjax.benchmarks.workload import Workload

OK, WRONG, REFUSED, NO_MEMORY, FAILED, ABSENT = "ok", "WRONG", "refused", "out of memory", "failed", "not installed"


@dataclasses.dataclass
class Row:
    """One case: what was computed, how, whether it was right, and how long it took.

    Times are seconds a call, rates useful FLOP/s a device. `baseline` is the one-device kernel, timed in turn with it.
    """

    mask: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    dtype: str
    kind: str
    strategy: str
    layout: str | None
    backend: str
    devices: int
    share: int = 0
    peer: bool = False
    status: str = OK
    reason: str = ""
    pairs: int = 0
    flops: float = 0.0
    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    choices: tuple[str, ...] = ()
    compile_seconds: float | None = None
    times: dict[str, Any] | None = None
    rate: float | None = None
    baseline: dict[str, Any] | None = None
    still: dict[str, Any] | None = None
    transfers: dict[str, Any] | None = None
    ranks: dict[int, dict[str, Any]] | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    peak_bytes: int | None = None
    profile: dict[str, Any] | None = None

    @classmethod
    def of(cls, work: Workload, way: Way, kind: str) -> "Row":
        """A row about this, with nothing measured yet."""
        share = way.ring_size if way.share and way.strategy != "one_device" else 0
        return cls(
            work.mask, work.length, work.heads, work.kv_heads, work.head_dim, work.batch, work.dtype, kind,
            way.strategy, way.layout, way.backend, devices=1 if share else way.ring_size, share=share,
            pairs=work.pairs, flops=work.flops(kind),
        )  # fmt: skip

    def describe(self, program: Program) -> None:
        """What is known of a program before it runs."""
        self.compile_seconds, self.memory, self.choices = program.compile_seconds, program.memory, program.choices

    @property
    def percent(self) -> float | None:
        """Of the one-device kernel's rate."""
        return None if self.rate is None or not self.baseline else 100 * self.rate / self.baseline["rate"]

    @property
    def exposed(self) -> float | None:
        """Seconds a call that the transfers add to the compute."""
        return self.times["median"] - self.still["median"] if self.times and self.still else None

    @property
    def exposed_percent(self) -> float | None:
        """Of what the transfers take alone."""
        if self.exposed is None or not self.transfers:
            return None
        return 100 * self.exposed / self.transfers["median"]

    @property
    def bytes_needed(self) -> int | None:
        """On one device: arguments, results and what the program needs between them."""
        if "temporary" not in self.memory:
            return None
        return sum(self.memory.get(name, 0) for name in ("arguments", "results", "temporary"))

    @property
    def good(self) -> bool:
        """Whether the command may end well after this row: a refusal is an answer, a wrong result of ours is not."""
        return self.peer or self.status not in (WRONG, FAILED)

    def plain(self) -> dict[str, Any]:
        derived = dict(
            percent=self.percent, exposed=self.exposed, exposed_percent=self.exposed_percent,
            bytes_needed=self.bytes_needed,
        )  # fmt: skip
        return {**dataclasses.asdict(self), **derived}
