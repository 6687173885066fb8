"""The one-device kernel that everything is held against, timed in the same process on the same inputs.

On NVIDIA GPUs cuDNN's attention as `jax.nn.dot_product_attention` gives it; elsewhere, and where cuDNN does not serve
the type or the size, `rj.attention` on one device. Always dense: causal, or full for mask `full`. Packed and windowed
rows are held against the causal rate, FLOPs being counted from visible pairs in both.
"""

import dataclasses
from collections.abc import Callable

import jax

from ringjax.benchmarks import programs, workload
from ringjax.benchmarks.programs import Program, Way
from ringjax.benchmarks.workload import Workload

SHORTEST = 4096


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A compiled one-device kernel, and the work that it does."""

    name: str
    work: Workload
    kind: str
    program: Program

    def rate(self, seconds: float) -> float:
        """Useful FLOP/s."""
        return self.work.flops(self.kind) / seconds


class Baselines:
    """Makes them as they are asked for and keeps the newest inputs only."""

    def __init__(self, longest: int, say: Callable[[str], None]):
        self.longest, self.say = longest, say
        self._made: dict[tuple[Workload, str], Baseline | None] = {}
        self._arrays: tuple[Workload, tuple] | None = None

    def get(self, work: Workload, kind: str, arrays) -> Baseline | None:
        """The baseline for this work; `arrays` are its q, k, v and dout in ascending order. None where none fits."""
        dense = dataclasses.replace(work, mask="full" if work.mask == "full" else "causal", mean_document=2)
        if (dense, kind) not in self._made:
            self._made = {key: made for key, made in self._made.items() if key[0] == dense}  # frees the others' inputs
            self._made[dense, kind] = self._make(dense, kind, arrays)
        return self._made[dense, kind]

    def _make(self, dense: Workload, kind: str, arrays) -> Baseline | None:
        length = min(dense.length, self.longest)
        while length >= min(SHORTEST, dense.length):
            work = dataclasses.replace(dense, length=length)
            try:
                return self._compile(work, kind, self._inputs(work, arrays if length == dense.length else None))
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            length //= 2
        self.say(f"no one-device kernel fits beside {dense.length} tokens: no percentages there")
        return None

    def _inputs(self, work: Workload, arrays) -> tuple:
        """`arrays` (None: new ones) on one device; both passes share them."""
        if self._arrays is None or self._arrays[0] != work:
            self._arrays = None  # frees the last ones first
            self._arrays = work, programs.on_first_device(workload.inputs(work) if arrays is None else arrays)
        return self._arrays[1]

    def _compile(self, work: Workload, kind: str, arrays) -> Baseline:
        device = jax.devices()[0]
        if device.platform == "gpu" and work.dtype != "float32":
            try:
                attend = programs.fused(work.mask == "causal")
                made = programs.compiled(programs.of_pass(attend, kind), *arrays, None)
                jax.block_until_ready(made.call())
                return Baseline("jax.nn cuDNN", work, kind, made)
            except (NotImplementedError, ValueError, RuntimeError) as error:
                if isinstance(error, jax.errors.JaxRuntimeError) and is_out_of_memory(error):
                    raise
                self.say(f"no cuDNN for the one-device kernel ({first_line(error)}); rj.attention auto instead")
        backend = "auto" if device.platform == "gpu" else "xla"
        attend = programs.attend(work, Way("one_device", None, backend, 1), None)
        made = programs.compiled(programs.of_pass(attend, kind), *arrays, None)
        jax.block_until_ready(made.call())
        return Baseline(f"rj.attention {backend}", work, kind, made)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory, when it compiled or when it ran."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
