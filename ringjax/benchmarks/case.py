"""One way of one workload: right? how fast? how much of that is waiting for other devices?"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Array, Int

import ringjax as rj
from ringjax.benchmarks import check, programs, rows, still, workload
from ringjax.benchmarks.baseline import first_line
from ringjax.benchmarks.profile import profiled
from ringjax.benchmarks.programs import Program, Way
from ringjax.benchmarks.rows import Row
from ringjax.benchmarks.session import Session
from ringjax.benchmarks.workload import Workload

# Calls in a profile: one alone begins with a wait that others don't have.
PROFILED = 3
# Why a ring's exposed communication is not given.
OTHER_WORK = "exposed: without its rotations the compiler makes another program of it"


@dataclasses.dataclass(frozen=True)
class Placed:
    """The inputs where a way wants them: layout order over a ring, or one device. `place` finds a token again."""

    arrays: tuple[Array, ...]
    place: Int[np.ndarray, " T"]

    @classmethod
    def of(cls, work: Workload, way: Way, ascending) -> "Placed":
        if way.strategy == "one_device":
            return cls(programs.on_first_device(ascending), np.arange(work.length))
        check_length(work, way)
        arrays = workload.in_layout(ascending, way.layout, way.ring_size, programs.ring_mesh(way.ring_size))
        return cls(arrays, workload.places(way.layout, way.ring_size, work.length))


def measure(session: Session, row: Row, work: Workload, way: Way, ascending, placed: Placed) -> None:
    """Compile, check, time and profile a way of `work`; its results go to `row`."""
    program = compiled(work, way, row.kind, placed)
    row.describe(program)
    if session.config.check:
        row.errors = _errors(session, row.kind, work, way, ascending, program, placed)
        if not check.passes(row.errors):
            row.status = rows.WRONG
            return
    others = {}
    if session.config.exposed and way.strategy == "ring" and way.ring_size > 1:
        others = _communication(row, work, way, placed, program)
    times = session.time(work, row.kind, ascending, ours=program, **others)
    session.fill(row, work, ascending, times, way.ring_size)
    row.still, row.transfers = (times[name].plain() if name in times else None for name in ("still", "transfers"))
    if session.config.profile is not None:
        _profile(session, row, program)


def compiled(work: Workload, way: Way, kind: str, placed: Placed) -> Program:
    """The program of a way."""
    mesh = None if way.strategy == "one_device" else programs.ring_mesh(way.ring_size)
    function = programs.of_pass(programs.attend(work, way, mesh), kind)
    return programs.compiled(function, *placed.arrays, reach_of(work, way))


def reach_of(work: Workload, way: Way) -> rj.Reach | None:
    """The reach in the order of the way's layout, where the arguments don't say it."""
    reach = work.reach()
    return reach if reach is None or way.layout is None else reach.permute(way.layout, way.ring_size)


def check_length(work: Workload, way: Way) -> None:
    """A length that the layout cannot cut is a refusal like a kernel's."""
    try:
        rj.layouts.get(way.layout).validate(work.length, way.ring_size)
    except ValueError as error:
        raise NotImplementedError(str(error)) from None


def _errors(session: Session, kind: str, work: Workload, way: Way, ascending, program: Program, placed: Placed):
    """At the work's own length, and where that is too long for all of it, at the check's."""
    (_, count), *others = session.checks(work, way.ring_size)
    found = [_errors_at(session, work, count, ascending, placed, program)]
    for short, count in others:

        def at_check_length(short=short, count=count):
            ascending = session.inputs(short)
            placed = Placed.of(short, way, ascending)
            return _errors_at(session, short, count, ascending, placed, compiled(short, way, kind, placed))

        found.append(session.once((short, way, kind), at_check_length))
    return check.worst(*found)


def _errors_at(session: Session, work: Workload, count: int | None, ascending, placed: Placed, program: Program):
    outputs = program.call()
    return check.worst(*(e.errors(outputs, placed.place) for e in session.expected(work, ascending, count)))


def _communication(row: Row, work: Workload, way: Way, placed: Placed, program: Program) -> dict[str, Program | None]:
    """The same ring without its rotations, and the rotations without the ring."""
    try:
        with still.in_place_of_ring(still.Still):
            quiet = compiled(work, way, row.kind, placed)
        if still.work_in(quiet.text) != still.work_in(program.text):
            row.reason = OTHER_WORK
            return {}
        transfers = programs.transfers(work, way, row.kind, programs.ring_mesh(way.ring_size))
        return {"still": quiet, "transfers": transfers}
    except Exception as error:  # the ring itself is still worth its time
        row.reason = f"exposed: {type(error).__name__}: {first_line(error)}"
        return {}


def _profile(session: Session, row: Row, program: Program) -> None:
    what = (row.mask, f"{row.heads}-{row.kv_heads}", row.length, row.strategy, row.layout, row.backend, row.kind)
    folder = Path(session.config.profile) / "_".join(str(x).replace(":", "") for x in what if x is not None)
    several = lambda: [program.call() for _ in range(PROFILED)]  # noqa: E731
    found = profiled(folder, several, program.text, session.say, top=25, calls=PROFILED)
    if found is not None:
        row.profile = found.plain()
        session.say("\n".join([f"{folder}:", *found.lines()]))
