"""`ringjax bench attention`: every way of every workload, checked, then timed in turn with the one-device kernel."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

import ringjax as rj
from ringjax.benchmarks import check, peers, programs, rows, still, timing, torch_peer, workload
from ringjax.benchmarks.baseline import Baselines, first_line, is_out_of_memory
from ringjax.benchmarks.config import AttentionBench, split_heads
from ringjax.benchmarks.memory import peak_bytes
from ringjax.benchmarks.profile import profiled
from ringjax.benchmarks.programs import Program, Way
from ringjax.benchmarks.rows import Row
from ringjax.benchmarks.workload import Workload

# Calls in a profile: one alone begins with a wait that others don't have.
PROFILED = 3
# Why a ring's exposed communication is not given.
OTHER_WORK = "without its rotations the compiler made another program of it"


@dataclasses.dataclass(frozen=True)
class Placed:
    """The inputs where a way wants them: layout order over a ring, or one device. `place` finds a token again."""

    arrays: tuple[Array, ...]
    place: Int[np.ndarray, " T"]


class AttentionRun:
    """All cases of a config; `rows` fills as they are done, and `done` is called after each."""

    def __init__(self, config: AttentionBench, say: Callable[[str], None], done: Callable[[Row], None], torch=()):
        """`torch`: what `torch_peer.run` measured."""
        self.config, self.say, self.done, self.torch = config, say, done, torch
        self.rows: list[Row] = []
        self.timed_baselines: dict[tuple[Workload, str], dict] = {}
        count = len(jax.devices())
        if config.devices is not None and config.devices > count:
            raise ValueError(f"devices is {config.devices} and there are {count}; ask for fewer, or simulate them on"
                             " the CPU with --simulated_devices")  # fmt: skip
        self.ring_size = config.share or config.devices or count
        self.baselines = Baselines(config.baseline_up_to, say)
        self.expected: dict[tuple, list[check.Expected]] = {}

    def run(self) -> list[Row]:
        for _, same in itertools.groupby(works(self.config), lambda work: (work.heads, work.kv_heads, work.mask)):
            self.expected = {}  # what is expected at `check_length` serves all lengths
            for work in same:
                self._workload(work)
        return self.rows

    def ways(self) -> list[Way]:
        """The ways of the config; one device needs no layout."""
        config, several = self.config, self.ring_size > 1
        strategies = config.strategies or (("one_device", "ring") if several else ("one_device",))
        found = []
        for strategy, backend in itertools.product(strategies, config.backends):
            if strategy == "one_device":
                found.append(Way(strategy, None, backend, 1))
                continue
            for layout in config.layouts:
                share = config.share > 0
                found.append(Way(strategy, layout, backend, self.ring_size, config.ulysses_size, share))
        return found

    # ------------------------------------------------------------------ one workload, one case

    def _workload(self, work: Workload) -> None:
        ascending = None
        for way in self.ways():
            placed = None
            for kind in self.config.passes:
                row = _row(work, way, kind)
                with self._outcome(row):
                    if ascending is None:
                        ascending = self._inputs(work)
                    placed = placed or self._placed(work, way, ascending)
                    self._case(row, work, way, kind, ascending, placed)
                self._finish(row)
        if self.config.peers:
            self.rows_of_peers(work, ascending)

    @contextlib.contextmanager
    def _outcome(self, row: Row) -> Iterator[None]:
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

    def _finish(self, row: Row) -> None:
        self.rows.append(row)
        self.done(row)

    def _case(self, row: Row, work: Workload, way: Way, kind: str, ascending, placed: Placed) -> None:
        if way.share:
            return self._share(row, work, way, kind, ascending)
        mesh = None if way.strategy == "one_device" else programs.ring_mesh(way.ring_size)
        program = self._program(work, way, kind, mesh, placed.arrays)
        _describe(row, program)
        if self.config.check:
            row.errors = self._errors(work, way, kind, mesh, ascending, program, placed)
            if not check.passes(row.errors):
                row.status = rows.WRONG
                return None
        self._time(row, work, way, kind, mesh, ascending, placed, program)
        return None

    def _program(self, work: Workload, way: Way, kind: str, mesh, arrays) -> Program:
        reach = _reach(work, way)
        return programs.compiled(programs.of_pass(programs.attend(work, way, mesh), kind), *arrays, reach)

    def _inputs(self, work: Workload) -> tuple[Array, ...]:
        """q, k, v and dout in ascending order, cut over the ring's devices (on one device for a share)."""
        if self.ring_size == 1 or self.config.share or work.length % self.ring_size:
            return workload.inputs(work)
        return workload.inputs(work, NamedSharding(programs.ring_mesh(self.ring_size), programs.SEQUENCE))

    def _placed(self, work: Workload, way: Way, ascending) -> Placed:
        if way.strategy == "one_device" or way.share:
            return Placed(programs.on_first_device(ascending), np.arange(work.length))
        _check_length(work, way)
        mesh = programs.ring_mesh(way.ring_size)
        arrays = workload.in_layout(ascending, way.layout, way.ring_size, mesh)
        return Placed(arrays, workload.places(way.layout, way.ring_size, work.length))

    # ------------------------------------------------------------------ right?

    def _errors(self, work: Workload, way: Way, kind: str, mesh, ascending, program: Program, placed: Placed):
        here = self._expected(work, ascending, self.config.check_rows)
        outputs = program.call()
        found = [e.errors(outputs, placed.place) for e in here]
        short = work.at(_short(work, way, self.config.check_length))
        if short.length < work.length:
            inputs = self._inputs(short)
            there = self._placed(short, way, inputs)
            outputs = self._program(short, way, kind, mesh, there.arrays).call()
            found += [e.errors(outputs, there.place) for e in self._expected(short, inputs, None)]
        return check.worst(*found)

    def _expected(self, work: Workload, arrays, count: int | None) -> list[check.Expected]:
        if (work, count) not in self.expected:
            asked = check.questions(work, arrays, count)
            self.expected[work, count] = [check.Expected.of(question) for question in asked]
        return self.expected[work, count]

    # ------------------------------------------------------------------ how fast?

    def _time(self, row: Row, work: Workload, way: Way, kind: str, mesh, ascending, placed: Placed, program) -> None:
        baseline = self.baselines.get(work, kind, ascending)
        turns = {"baseline": baseline and baseline.program, "ours": program}
        if self.config.exposed and way.strategy == "ring" and way.ring_size > 1:
            turns |= self._communication(row, work, way, kind, mesh, placed, program)
        times = self._turns({name: p.call for name, p in turns.items() if p is not None})
        row.times, row.rate = times["ours"].plain(), row.flops / row.devices / times["ours"].median
        row.peak_bytes = peak_bytes()
        if baseline is not None:
            self._hold_against(row, work, baseline, times["baseline"])
        for name in ("still", "transfers"):
            if name in times:
                setattr(row, name, times[name].plain())
        self._profile(row, program)

    def _profile(self, row: Row, program: Program) -> None:
        if self.config.profile is None:
            return
        what = (row.mask, f"{row.heads}-{row.kv_heads}", row.length, row.strategy, row.layout, row.backend, row.kind)
        folder = Path(self.config.profile) / "_".join(str(x).replace(":", "") for x in what if x is not None)
        several = lambda: [program.call() for _ in range(PROFILED)]  # noqa: E731
        found = profiled(folder, several, program.text, self.say, top=25, calls=PROFILED)
        if found is not None:
            row.profile = found.plain()
            self.say("\n".join([f"{folder}:", *found.lines()]))

    def _communication(self, row: Row, work, way: Way, kind: str, mesh, placed: Placed, program) -> dict:
        """The same ring without its rotations, and the rotations without the ring."""
        with still.in_place_of_ring(still.Still):
            quiet = self._program(work, way, kind, mesh, placed.arrays)
        if still.work_in(quiet.text) != still.work_in(program.text):
            row.reason = OTHER_WORK
            return {}
        return {"still": quiet, "transfers": programs.transfers(work, way, kind, mesh)}

    def _turns(self, calls: dict[str, Callable]) -> dict[str, timing.Times]:
        config = self.config
        # Programs in flight together would fight for the few threads of simulated devices.
        seconds = 0.0 if jax.devices()[0].platform == "cpu" else config.run_seconds
        return timing.in_turns(calls, repeats=config.repeats, warmup=config.warmup, run_seconds=seconds)

    def _hold_against(self, row: Row, work: Workload, baseline, times: timing.Times) -> None:
        row.baseline = {
            "name": baseline.name, "length": baseline.work.length, "mask": baseline.work.mask,
            "rate": baseline.rate(times.median), **times.plain(),
        }  # fmt: skip
        self.timed_baselines[work, row.kind] = row.baseline

    # ------------------------------------------------------------------ others

    def rows_of_peers(self, work: Workload, ascending) -> None:
        """Other projects' attention on the same work."""
        for peer, kind in itertools.product(self.config.peers, self.config.passes):
            if peer == "torch":
                for result in self.torch:
                    if torch_peer.is_of(result, work, kind):
                        self._finish(torch_peer.row_of(result, work, self.timed_baselines.get((work, kind))))
                continue
            devices = 1 if peers.on_one_device(peer) else self.ring_size
            row = _row(work, Way(peer, None if devices == 1 else "contiguous", "–", devices), kind)
            with self._outcome(row):
                self._peer(row, work, peer, kind, self._inputs(work) if ascending is None else ascending)
            self._finish(row)

    def _peer(self, row: Row, work: Workload, peer: str, kind: str, ascending) -> None:
        """The fastest of a peer's settings."""
        if self.config.share:
            raise NotImplementedError(f"a share of {peer}: its ring cannot be taken apart")
        mesh = programs.ring_mesh(row.devices)
        arrays = programs.on_first_device(ascending) if row.devices == 1 else ascending
        best, seconds, failure = None, float("inf"), None
        for candidate in peers.candidates(peer, work, mesh):
            try:
                program = programs.compiled(programs.of_pass(candidate.attend, kind), *arrays, work.reach())
                took = timing.in_turns({"": program.call}, repeats=2, warmup=2)[""].least
            except Exception as error:  # one of its settings, not the peer
                failure = error
                continue
            if took < seconds:
                best, seconds, row.backend = program, took, candidate.label
        if best is None:
            raise failure or NotImplementedError(f"{peer} has no setting for this")
        _describe(row, best)
        if self.config.check:
            place = np.arange(work.length)
            outputs = best.call()
            expected = self._expected(work, ascending, self.config.check_rows)
            row.errors = check.worst(*(e.errors(outputs, place) for e in expected))
            if max(found for found, _ in row.errors.values()) > peers.NONSENSE:
                row.status = rows.WRONG
                return
        baseline = self.baselines.get(work, kind, ascending)
        times = self._turns(({"baseline": baseline.program.call} if baseline else {}) | {"ours": best.call})
        row.times, row.rate = times["ours"].plain(), row.flops / row.devices / times["ours"].median
        if baseline is not None:
            self._hold_against(row, work, baseline, times["baseline"])

    # ------------------------------------------------------------------ a share

    def _share(self, row: Row, work: Workload, way: Way, kind: str, ascending) -> None:
        """Device after device of a ring that isn't there; the ring would wait for the slowest."""
        if way.strategy != "ring":
            raise NotImplementedError(f"a share of strategy {way.strategy!r}: without its transfers there is no work")
        _check_length(work, way)
        baseline = self.baselines.get(work, kind, ascending)
        row.ranks, slowest = {}, None
        for rank in self.config.ranks or range(way.ring_size):
            program, errors = self._one_share(work, way, kind, rank, ascending)
            row.errors = check.worst(row.errors, errors)
            if not check.passes(errors):
                row.status, row.reason = rows.WRONG, f"the share of device {rank}"
                return
            turns = {"baseline": baseline.program.call} if baseline else {}
            times = self._turns(turns | {"ours": program.call})
            row.ranks[rank] = times["ours"].plain()
            if slowest is None or times["ours"].median > slowest["ours"].median:
                slowest = times
                _describe(row, program)
        row.times = slowest["ours"].plain()
        row.rate = row.flops / way.ring_size / slowest["ours"].median
        row.peak_bytes = peak_bytes()
        if baseline is not None:
            self._hold_against(row, work, baseline, slowest["baseline"])

    def _one_share(self, work: Workload, way: Way, kind: str, rank: int, ascending):
        found = []
        if self.config.check:
            short = work.at(_short(work, way, self.config.check_length))
            if short.length < work.length:
                _, errors = self._share_program(short, way, kind, rank, self._inputs(short), None)
                found.append(errors)
        program, errors = self._share_program(work, way, kind, rank, ascending, self.config.check_rows)
        return program, check.worst(errors, *found)

    def _share_program(self, work: Workload, way: Way, kind: str, rank: int, ascending, count: int | None):
        """The program of one device, and its errors where they are asked for."""
        length = work.length // way.ring_size
        arrays = tuple(x[:, :length] for x in ascending)
        reach = _reach(work, way)
        if reach is not None:
            mine = slice(rank * length, (rank + 1) * length)
            reach = dataclasses.replace(reach, behind=reach.behind[:, mine], ahead=reach.ahead[:, mine])
        with still.as_device(rank, way.ring_size):
            program = programs.compiled(programs.of_pass(programs.attend(work, way, None), kind), *arrays, reach)
        if not self.config.check:
            return program, {}
        outputs, place = program.call(), np.arange(length)
        asked = check.share_questions(work, way.layout, way.ring_size, rank, arrays, count)
        return program, check.worst(*(check.Expected.of(question).errors(outputs, place) for question in asked))


def _reach(work: Workload, way: Way):
    reach = work.reach()
    return reach if reach is None or way.strategy == "one_device" else reach.permute(way.layout, way.ring_size)


def _check_length(work: Workload, way: Way) -> None:
    """A length that the layout cannot cut is a refusal like a kernel's."""
    try:
        rj.layouts.get(way.layout).validate(work.length, way.ring_size)
    except ValueError as error:
        raise NotImplementedError(str(error)) from None


def _short(work: Workload, way: Way, wanted: int) -> int:
    """The length of the full check: the wanted one, cut so that every layout can have it and shards aren't tiny."""
    multiple = 256 * way.ring_size
    length = max(multiple, wanted // multiple * multiple) if wanted else work.length
    return min(length, work.length)


def _row(work: Workload, way: Way, kind: str) -> Row:
    return Row(
        work.mask, work.length, work.heads, work.kv_heads, work.head_dim, work.batch, work.dtype, kind, way.strategy,
        way.layout, way.backend, devices=1 if way.share else way.ring_size, share=way.ring_size if way.share else 0,
        pairs=work.pairs, flops=work.flops(kind),
    )  # fmt: skip


def _describe(row: Row, program: Program) -> None:
    row.compile_seconds, row.memory, row.choices = program.compile_seconds, program.memory, program.choices


def works(config: AttentionBench) -> Iterator[Workload]:
    """What the config asks for, without a device."""
    for heads, mask, length in itertools.product(config.heads, config.masks, config.lengths):
        query_heads, kv_heads = split_heads(heads)
        yield Workload(
            mask, length, query_heads, kv_heads, config.head_dim, config.batch, config.dtype,
            config.mean_document if mask == "packed" else 2, config.seed,
        )  # fmt: skip


def run_attention(
    config: AttentionBench, say: Callable[[str], None], done: Callable[[Row], None], torch=()
) -> Sequence[Row]:
    """All rows of a config."""
    return AttentionRun(config, say, done, torch).run()
