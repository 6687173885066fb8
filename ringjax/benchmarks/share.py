"""One device's share of a ring that isn't there: every device's, one after the other, on one device.

Transfers are left out. K and V are those of this device in every hop, so that what it computes can be checked.
"""

import dataclasses

import numpy as np

from ringjax.benchmarks import check, programs, rows, still
from ringjax.benchmarks.case import check_length, reach_of
from ringjax.benchmarks.check import Errors
from ringjax.benchmarks.programs import Program, Way
from ringjax.benchmarks.rows import Row
from ringjax.benchmarks.session import Session
from ringjax.benchmarks.workload import Workload


def measure(session: Session, row: Row, work: Workload, way: Way, ascending) -> None:
    """Check and time the shares; `row` gets the slowest one's time, for which a ring would wait."""
    if way.strategy != "ring":
        raise NotImplementedError(f"a share of strategy {way.strategy!r}: without its transfers there is no work")
    check_length(work, way)
    row.ranks, slowest = {}, None
    for rank in session.config.ranks or range(way.ring_size):
        program = _compiled(work, way, row.kind, rank, ascending)
        if session.config.check:
            row.errors = check.worst(row.errors, _errors(session, program, work, way, row.kind, rank, ascending))
            if not check.passes(row.errors):
                row.status, row.reason = rows.WRONG, f"the share of device {rank}"
                return
        times = session.time(work, row.kind, ascending, ours=program)
        row.ranks[rank] = times["ours"].plain()
        if slowest is None or times["ours"].median > slowest["ours"].median:
            slowest = times
            row.describe(program)
    session.fill(row, work, ascending, slowest, way.ring_size)


def _errors(session: Session, program: Program, work: Workload, way: Way, kind: str, rank: int, ascending) -> Errors:
    (_, count), *others = session.checks(work, way.ring_size)
    found = [_errors_at(work, way, rank, count, ascending, program)]
    for short, count in others:

        def at_check_length(short=short, count=count):
            inputs = session.inputs(short)
            return _errors_at(short, way, rank, count, inputs, _compiled(short, way, kind, rank, inputs))

        found.append(session.once((short, way, kind, rank), at_check_length))
    return check.worst(*found)


def _errors_at(work: Workload, way: Way, rank: int, count: int | None, ascending, program: Program) -> Errors:
    outputs, place = program.call(), np.arange(work.length // way.ring_size)
    asked = check.share_questions(work, way.layout, way.ring_size, rank, _own(work, way, ascending), count)
    return check.worst(*(check.Expected.of(question).errors(outputs, place) for question in asked))


def _compiled(work: Workload, way: Way, kind: str, rank: int, ascending) -> Program:
    """What device `rank` does."""
    length, reach = work.length // way.ring_size, reach_of(work, way)
    if reach is not None:
        mine = slice(rank * length, (rank + 1) * length)
        reach = dataclasses.replace(reach, behind=reach.behind[:, mine], ahead=reach.ahead[:, mine])
    function = programs.of_pass(programs.attend(work, way, None), kind)
    with still.as_device(rank, way.ring_size):
        return programs.compiled(function, *_own(work, way, ascending), reach)


def _own(work: Workload, way: Way, ascending):
    """Arrays of one device's size; which tokens they were is of no matter to random numbers."""
    return tuple(x[:, : work.length // way.ring_size] for x in ascending)
