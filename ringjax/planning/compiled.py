"""What the compiler says of a training step on a TPU slice that is not there: memory, rotations, time to compile.

    said = compile_stage(stage, Target.parse("tpu:v4:8x8x16"))
    said.used, said.limit                 # bytes on each chip at the fullest moment, and what a chip has
    said.hidden, said.exposed             # messages of a step that run beside compute, and that do not

A program that does not fit is no error here: the compiler's own figures are read from its message.
"""

import dataclasses
import re
import time

import jax

from ringjax.planning import ahead, hlo
from ringjax.planning.devices import Target
from ringjax.training.config import StageConfig

ROTATION = "ring/rotate"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# Two checks of XLA for TPUs: one before memory is assigned, one after it.
_OVERFLOWS = (
    re.compile(rf"Used {_SIZE}B? of {_SIZE}B? hbm", re.I),
    re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_LARGEST = re.compile(rf"Size: {_SIZE}\n(?:\s*Operator: op_name=\"([^\"]*)\"\n)?\s*Shape: (\S+?)[{{\s]")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step, or why there is none. Bytes on each device; `hidden` and `exposed` count the
    ring's messages: K and V of a rotation are one each."""

    seconds: float
    used: float
    limit: float
    arguments: float = 0.0
    hidden: int = 0
    exposed: int = 0
    problem: str | None = None
    at_most: bool = False
    """Whether `used` is a bound: what is offloaded to the host hides the device's own peak."""

    @property
    def fits(self) -> bool:
        """Whether the compiler made a program."""
        return self.problem is None

    @property
    def rotations(self) -> str:
        """For people."""
        total = self.hidden + self.exposed
        if not self.fits:
            return "–"
        return "none" if total == 0 else f"{self.hidden:,} of {total:,} messages hidden"


def compile_stage(stage: StageConfig, target: Target) -> Compiled:
    """Compiles the step of `ringjax train` for a slice.

    Raises NotImplementedError for GPUs, ModuleNotFoundError without libtpu, ValueError for a slice that does not exist.
    """
    if target.libtpu is None:
        raise NotImplementedError(
            f"--compile for {target}: compiling ahead of time is for TPU slices, such as tpu:v5p:4x8x8; on a GPU"
            " `ringjax bench train` says what the compiler and the device say"
        )
    program = ahead.training_program(stage, ahead.slice_devices(target.libtpu))
    start = time.perf_counter()
    try:
        step = program.compile()
    except jax.errors.JaxRuntimeError as error:
        return overflow(str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats = step.memory_analysis()
    transfers = [x for x in hlo.Program(step.as_text()).transfers() if _is_rotation(x, target)]
    hidden = sum(transfer.times for transfer in transfers if transfer.hidden)
    total = sum(transfer.times for transfer in transfers)
    return Compiled(
        seconds, peak(stats), target.device.usable, stats.argument_size_in_bytes, hidden, total - hidden,
        at_most=stats.host_temp_size_in_bytes > 0,
    )  # fmt: skip


def _is_rotation(transfer: hlo.Transfer, target: Target) -> bool:
    """Compiled for several slices, XLA does not say where a permute comes from."""
    return ROTATION in transfer.scope or transfer.across or (target.slices > 1 and not transfer.scope)


def peak(stats) -> float:
    """Bytes at the fullest moment, arguments included.

    `temp_size_in_bytes` is more: it adds up what is there at different times. A step of which that alone exceeded a
    chip's memory compiled for it (docs/results/planning.md). The peak counts the host's memory too, so where something
    lies there that sum has to do, as a bound.
    """
    if stats.host_temp_size_in_bytes:
        return float(stats.argument_size_in_bytes + stats.temp_size_in_bytes)
    return float(stats.peak_memory_in_bytes)


def overflow(message: str, seconds: float) -> Compiled:
    """What a compilation that ran out of memory says; raises RuntimeError for one that failed otherwise."""
    for pattern in _OVERFLOWS:
        if found := pattern.search(message):
            used, limit = _bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])
            return Compiled(seconds, used, limit, problem=_why(message, used, limit))
    raise RuntimeError(f"the step does not compile: {message.strip().splitlines()[0]}")


def _why(message: str, used: float, limit: float) -> str:
    words = f"the compiler needs {used / 2**30:.2f} GiB of {limit / 2**30:.2f}, {(used - limit) / 2**30:.2f} too many"
    found = _LARGEST.search(message)
    if found is None:
        return words
    size, unit, scope, shape = found.groups()
    where = f" ({scope.split('/')[-1]})" if scope else ""
    return f"{words}; the largest array is {shape}{where}, {_bytes(size, unit) / 2**30:.2f} GiB"


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit.upper()]
