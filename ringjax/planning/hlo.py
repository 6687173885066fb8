"""Reading a compiled and scheduled XLA program: what each transfer between devices is hidden behind.

`jax.jit(f).lower(...).compile().as_text()` of a TPU program lists instructions in the order in which they start. A
transfer is two of them, `collective-permute-start` and `-done`; the core is free for what stands between:

    %start = collective-permute-start(%kv)
    %out   = custom-call(%q, %kv), custom_call_target="tpu_custom_call"       <- hidden behind this
    %done  = collective-permute-done(%start)

From one TPU slice to another it goes by the data-center network: `send` and `recv`, each with its `-done`. A permute of
which only some pairs cross is both.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Collection, Iterator

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
OPERATION = re.compile(r" ?([a-z][\w\-]*)\((.*)$")
CALLED = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)')
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
SCOPE = re.compile(r'op_name="([^"]*)"')
# What the data-center network carries of a `lax.ppermute`, and not of a sum over slices.
RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="(ppermute[^"]*)"')
KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu|__cudnn\$|__cublas\$)')
COMPUTES = ("dot", "convolution")
MOVES = ("copy", "copy-start", "transpose", "slice", "dynamic-slice", "pad", "concatenate")
FREE = ("parameter", "constant", "bitcast", "reshape", "tuple", "get-tuple-element")
FAST_MEMORY = re.compile(r"S\(1\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type operation(rest`, where `rest` has operands and attributes."""

    name: str
    type: str
    operation: str
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs: a loop's body, a conditional's branches, what a fusion fuses."""
        branches = (name.strip().lstrip("%") for found in BRANCHES.findall(self.rest) for name in found.split(","))
        return [*CALLED.findall(self.rest), *branches]

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    @property
    def scope(self) -> str:
        """The `jax.named_scope`s and functions that it comes from."""
        found = SCOPE.search(self.rest)
        return found[1] if found else ""

    @property
    def is_kernel(self) -> bool:
        """Whether it calls a Pallas kernel or, on a GPU, one of cuDNN or cuBLAS."""
        return self.operation == "custom-call" and KERNEL.search(self.rest) is not None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One `collective-permute`, run `times` times; `behind` are the instructions with matrix products meanwhile.

    XLA makes permutes of gathered weights too: `scope` says where one comes from, "ring/rotate" for rotations. `across`
    is one that goes from TPU slice to TPU slice, of which XLA says only that it is a `lax.ppermute`.
    """

    dtype: str
    shape: tuple[int, ...]
    times: int
    behind: tuple[Instruction, ...]
    scope: str = ""
    across: bool = False

    @property
    def hidden(self) -> bool:
        return bool(self.behind)

    @property
    def bytes(self) -> int:
        """On the wire, each time."""
        return size(self.dtype, self.shape)


class Program:
    """The computations of an HLO module, each a list of instructions in the order of the schedule."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = collections.defaultdict(list)
        self.entry, name = "", None
        for line in text.splitlines():
            if header := HEADER.match(line):
                name = header[2]
                self.entry = name if header[1] else self.entry
            elif line == "}":
                name = None
            elif name is not None and (found := _instruction(line)):
                self.computations[name].append(found)
        self._computes = functools.cache(self._computes)

    def executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[str, int]]:
        """Every computation that one run reaches, as (name, how often); loops whose count is data are not entered."""
        name = self.entry if name is None else name
        yield name, times
        for instruction in self.computations[name]:
            trips = self.trips(instruction)
            for called in instruction.called if trips is not None else ():
                yield from self.executed(called, times * trips)

    def trips(self, instruction: Instruction) -> int | None:
        """How often it runs what it calls; None for a loop whose count is data.

        Compiled for TPU, a scan says so only in its condition, `counter < constant`; the counter starts at 0.
        """
        if instruction.operation != "while":
            return 1
        if found := TRIPS.search(instruction.rest):
            return int(found[1])
        condition = {line.name: line for line in self.computations[CONDITION.search(instruction.rest)[1]]}
        *_, last = condition.values()
        if last.operation == "compare" and "direction=LT" in last.rest:
            bound = condition[last.operands[1]]
            if bound.operation == "constant":
                return int(bound.rest.split(")")[0])
        return None

    def transfers(self) -> list[Transfer]:
        """All collective permutes of one run; one that some devices make inside a slice and some across is two."""
        found = []
        for name, times in self.executed():
            schedule = self.computations[name]
            for place, instruction in enumerate(schedule):
                if instruction.operation == "collective-permute":
                    found.append(Transfer(*arrays(instruction.type)[0], times, (), instruction.scope))
                elif instruction.operation == "collective-permute-start":
                    behind = self._meanwhile(schedule, place)
                    found.append(Transfer(*arrays(instruction.type)[0], times, behind, instruction.scope))
                elif instruction.operation == "recv" and (met := RENDEZVOUS.search(instruction.rest)):
                    behind = self._meanwhile(schedule, place)
                    found.append(Transfer(*arrays(instruction.type)[0], times, behind, met[1], across=True))
        return found

    def computes(self, instruction: Instruction) -> bool:
        """Whether it is, or runs, a kernel or a matrix product."""
        if instruction.is_kernel or instruction.operation in COMPUTES:
            return True
        return any(self._computes(name) for name in instruction.called)

    def copied(self, dtype: str, elements: Collection[int]) -> int:
        """The bytes that one run writes to memory without computing anything: arrays of `dtype` with one of the numbers
        of `elements`, copied, sliced out of another or laid out anew, alone or in a fusion of nothing else.

        Moves into fast memory and back are not counted: the kernel that finds its operand there saves as much.
        """
        fused, total = self._fused(), 0
        for name, times in self.executed():
            for instruction in () if name in fused else filter(self._moves, self.computations[name]):
                written = arrays(instruction.type)[: 1 if instruction.operation == "copy-start" else None]
                total += times * sum(size(*x) for x in written if x[0] == dtype and math.prod(x[1]) in elements)
        return total

    def _moves(self, instruction: Instruction) -> bool:
        if instruction.operation == "copy-start":
            return not FAST_MEMORY.search(instruction.type)
        if instruction.operation != "fusion":
            return instruction.operation in MOVES
        inside = [line.operation for name in instruction.called for line in self.computations[name]]
        return set(inside) <= {*MOVES, *FREE}

    def _fused(self) -> set[str]:
        lines = itertools.chain.from_iterable(self.computations.values())
        return {name for line in lines if line.operation == "fusion" for name in line.called}

    def _computes(self, name: str) -> bool:
        return any(self.computes(instruction) for instruction in self.computations[name])

    def _meanwhile(self, schedule: list[Instruction], place: int) -> tuple[Instruction, ...]:
        """What computes between a start and its end."""
        start = schedule[place]
        done = f"{start.operation.removesuffix('-start')}-done"
        for end, instruction in enumerate(schedule[place:], place):
            if instruction.operation == done and start.name in instruction.operands:
                return tuple(filter(self.computes, schedule[place + 1 : end]))
        raise ValueError(f"{start.name} is not awaited in its computation")


def arrays(type: str) -> list[tuple[str, tuple[int, ...]]]:
    """The (dtype, shape) of each array of an HLO type, which may be a tuple."""
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, _, dims in ARRAY.findall(type)]


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(shape) * bits // 8


def _instruction(line: str) -> Instruction | None:
    found = INSTRUCTION.match(line)
    if not found:
        return None
    name, text = found.groups()
    end = _end_of_type(text)
    operation = OPERATION.match(text[end:])
    return Instruction(name, text[:end], operation[1], operation[2]) if operation else None


def _end_of_type(text: str) -> int:
    """A type is one word, or a tuple in parentheses, whose layouts have parentheses too."""
    if not text.startswith("("):
        return text.index(" ")
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]}")
