"""`ringjax bench attention`: every way of every workload, checked, then timed in turn with the one-device kernel."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ringjax.attention.strategies import BY_HOST
from ringjax.benchmarks import case, check, peers, programs, rows, share, timing, torch_peer
from ringjax.benchmarks.baseline import first_line, is_out_of_memory
from ringjax.benchmarks.config import AttentionBench, split_heads
from ringjax.benchmarks.programs import Program, Way
from ringjax.benchmarks.rows import Row
from ringjax.benchmarks.session import Session
from ringjax.benchmarks.workload import Workload

Done = Callable[[Row], None]


def run_attention(config: AttentionBench, say: Callable[[str], None], done: Done, torch: Sequence[dict] = ()) -> None:
    """All rows of a config, each given to `done` when it is there. `torch`: what `torch_peer.run` measured.

    Raises ValueError when there are too few devices.
    """
    session = Session(config, say)
    for _, same in itertools.groupby(works(config), lambda work: (work.heads, work.kv_heads, work.mask)):
        session.forget()  # what is expected at `check_length` serves all lengths
        for work in same:
            for row in _rows_of(session, work, torch):
                done(row)


def works(config: AttentionBench) -> Iterator[Workload]:
    """What the config asks for; needs no device."""
    for heads, mask, length in itertools.product(config.heads, config.masks, config.lengths):
        query_heads, kv_heads = split_heads(heads)
        yield Workload(
            mask, length, query_heads, kv_heads, config.head_dim, config.batch, config.dtype,
            config.mean_document if mask == "packed" else 2, config.seed,
        )  # fmt: skip


def ways(config: AttentionBench, ring_size: int) -> list[Way]:
    """How each workload is computed; one device needs no layout."""
    strategies = config.strategies or (("one_device", "ring") if ring_size > 1 else ("one_device",))
    if config.share and not config.strategies:
        strategies = ("ring",)
    found = []
    for strategy, backend in itertools.product(strategies, config.backends):
        if strategy == "one_device":
            found.append(Way(strategy, None, backend, 1))
            continue
        group = config.ulysses_size if strategy == "hybrid" else None
        host = config.host_size if strategy in BY_HOST and group is None else None
        for layout in config.layouts:
            found.append(Way(strategy, layout, backend, ring_size, group, config.share > 0, host))
    return found


def _rows_of(session: Session, work: Workload, torch: Sequence[dict]) -> Iterator[Row]:
    ascending = None
    for way in ways(session.config, session.ring_size):
        placed = None
        for kind in session.config.passes:
            row = Row.of(work, way, kind)
            with outcome(row):
                ascending = ascending or session.inputs(work)
                if way.share and way.strategy != "one_device":
                    share.measure(session, row, work, way, ascending)
                else:
                    placed = placed or case.Placed.of(work, way, ascending)
                    case.measure(session, row, work, way, ascending, placed)
            yield row
    for peer, kind in itertools.product(session.config.peers, session.config.passes):
        if peer == "torch":
            results = [result for result in torch if torch_peer.is_of(result, work, kind)]
            yield from (
                torch_peer.row_of(result, work, session.timed_baselines.get((work, kind))) for result in results
            )
            continue
        devices = 1 if peers.on_one_device(peer) else session.ring_size
        row = Row.of(work, Way(peer, None if devices == 1 else "contiguous", "–", devices), kind)
        row.peer = True
        with outcome(row):
            ascending = ascending or session.inputs(work)
            _measure_peer(session, row, work, ascending)
        yield row


@contextlib.contextmanager
def outcome(row: Row) -> Iterator[None]:
    """What goes wrong inside becomes the row's status: one case must not take the others with it."""
    try:
        yield
    except peers.Absent as error:
        row.status, row.reason = rows.ABSENT, first_line(error)
    except NotImplementedError as error:
        row.status, row.reason = rows.REFUSED, first_line(error)
    except Exception as error:
        row.status = rows.NO_MEMORY if is_out_of_memory(error) else rows.FAILED
        row.reason = f"{type(error).__name__}: {first_line(error)}"


def _measure_peer(session: Session, row: Row, work: Workload, ascending) -> None:
    """The fastest of a peer's settings."""
    if session.config.share:
        raise NotImplementedError(f"a share of {row.strategy}: its ring cannot be taken apart")
    arrays = programs.on_first_device(ascending) if row.devices == 1 else ascending
    key = row.strategy, row.kind  # what was best at one length is taken at the next: each setting compiles for long
    row.backend, best = _fastest(row, work, arrays, session.best_settings.get(key))
    session.best_settings[key] = row.backend
    row.describe(best)
    if session.config.check:
        outputs, place = best.call(), np.arange(work.length)
        _, count = session.checks(work, row.devices)[0]
        expected = session.expected(work, ascending, count)
        row.errors = check.worst(*(e.errors(outputs, place) for e in expected))
        if max(found for found, _ in row.errors.values()) > peers.NONSENSE:
            row.status = rows.WRONG
            return
    session.fill(row, work, ascending, session.time(work, row.kind, ascending, ours=best), row.devices)


def _fastest(row: Row, work: Workload, arrays, known: str | None) -> tuple[str, Program]:
    best, failure = (float("inf"), "", None), None
    found = list(peers.candidates(row.strategy, work, programs.ring_mesh(row.devices)))
    for candidate in [candidate for candidate in found if candidate.label == known] or found:
        try:
            program = programs.compiled(programs.of_pass(candidate.attend, row.kind), *arrays, work.reach())
            seconds = timing.in_turns({"": program.call}, repeats=2, warmup=2)[""].least
        except Exception as error:  # one of its settings, not the peer
            failure = error
            continue
        best = min(best, (seconds, candidate.label, program), key=lambda found: found[0])
    if best[2] is None:
        raise failure or NotImplementedError(f"{row.strategy} has no setting for this")
    return best[1:]
