"""Nothing is timed before it was compared with float64 (`oracle`).

A way is checked twice, each time by the very code that is then timed:

    at `check_length`   out, dq, dk, dv of every query and key
    at its own length   out and dq of queries drawn anywhere and of the last ones; dk and dv of the last keys, which
                        under a causal mask (packed, windowed) nobody else sees

It passes when its error, ‖found − float64‖ / ‖float64‖, is at most 2 (out) or 3 (gradients) times that of the plain
formula in the same type on one device, or 1e-5 if that is more.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Float, Int

import ringjax as rj
from ringjax.benchmarks import oracle
from ringjax.benchmarks.workload import Workload

FACTORS = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}
FLOAT32 = 1e-5

Errors = dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Question:
    """Some queries of one row and all its keys, ascending, as NumPy arrays in the inputs' type.

    `keys` are those whose gradient is to be judged. `fold` turns dk and dv of all keys into what the judged function
    gives, where that is something else.
    """

    row: int
    queries: Int[np.ndarray, " M"]
    keys: Int[np.ndarray, " L"]
    q: Float[np.ndarray, "M N H"]
    k: Float[np.ndarray, "S K H"]
    v: Float[np.ndarray, "S K H"]
    dout: Float[np.ndarray, "M N H"]
    start: Int[np.ndarray, " M"]
    stop: Int[np.ndarray, " M"]
    fold: Callable[[np.ndarray], np.ndarray] = lambda x: x

    def answer(self) -> oracle.Results:
        """In float64."""
        found = oracle.attention(self.q, self.k, self.v, self.start, self.stop, self.dout)
        return self._judged(found)

    def plain(self) -> oracle.Results:
        """By the plain formula in the inputs' own type."""
        index = len(self.k) - len(self.q) + np.arange(len(self.q))
        reach = rj.Reach(*(jnp.asarray(x[None], jnp.int32) for x in (index - self.start, self.stop - 1 - index)))
        out, *grads = _plain(*(jnp.asarray(x[None]) for x in (self.q, self.k, self.v, self.dout)), reach)
        return self._judged(oracle.Results(*(np.asarray(x[0], np.float64) for x in (out, *grads))))

    def _judged(self, found: oracle.Results) -> oracle.Results:
        return found._replace(dk=self.fold(found.dk)[self.keys], dv=self.fold(found.dv)[self.keys])


@jax.jit
def _plain(q, k, v, dout, reach):
    out, pull = jax.vjp(lambda q, k, v: rj.attention(q, k, v, reach=reach, backend="reference"), q, k, v)
    return out, *pull(dout.astype(out.dtype))


@dataclasses.dataclass(frozen=True)
class Expected:
    """A question, its answer, and how far from it is near enough."""

    question: Question
    answer: oracle.Results
    bounds: dict[str, float]

    @classmethod
    def of(cls, question: Question) -> "Expected":
        answer, plain = question.answer(), question.plain()
        pairs = zip(FACTORS.items(), plain, answer)
        bounds = {name: max(FLOAT32, factor * error(found, exact)) for (name, factor), found, exact in pairs}
        return cls(question, answer, bounds)

    def errors(self, outputs: Sequence[jax.Array], place: Int[np.ndarray, " T"]) -> Errors:
        """`(error, bound)` of `(out,)` or `(out, dq, dk, dv)`, whose token of global index g sits at `place[g]`."""
        row, queries, keys = self.question.row, self.question.queries, self.question.keys
        errors = {}
        for name, output, exact in zip(FACTORS, outputs, self.answer):
            rows = place[queries if name in ("out", "dq") else keys]
            if len(rows):
                errors[name] = error(np.asarray(output[row, rows], np.float64), exact), self.bounds[name]
        return errors


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """‖found − exact‖ / ‖exact‖; infinite where something found isn't finite."""
    if not np.isfinite(found).all():
        return float("inf")
    norm = np.linalg.norm(exact)
    return float(np.linalg.norm(found - exact) / (norm if norm else 1.0))


def passes(errors: Errors) -> bool:
    """Whether all errors are within their bounds."""
    return all(found <= bound for found, bound in errors.values())


def worst(*several: Errors) -> Errors:
    """Of each result the error that is nearest to its bound, or furthest beyond."""
    names = dict.fromkeys(name for errors in several for name in errors)
    found = {name: [errors[name] for errors in several if name in errors] for name in names}
    return {name: max(pairs, key=lambda pair: pair[0] / pair[1]) for name, pairs in found.items()}


def questions(work: Workload, arrays, count: int | None) -> list[Question]:
    """Questions about the first and the last row of the batch; `count` queries of each kind, None for all of them.

    `arrays` are q, k, v and dout in ascending order.
    """
    asked = []
    for row in sorted({0, work.batch - 1}):
        start, stop = (x[row] for x in work.interval)
        queries, keys = _drawn(start, stop, count, work.seed + row)
        q, k, v, dout = arrays
        asked.append(
            Question(
                row,
                queries,
                keys,
                _host(q[row, queries]),
                _host(k[row]),
                _host(v[row]),
                _host(dout[row, queries]),
                start[queries],
                stop[queries],
            )  # fmt: skip
        )
    return asked


def share_questions(work: Workload, layout: str, ring_size: int, rank: int, arrays, count: int | None):
    """Questions about one device's share, whose visitors all bring this device's own K and V: in slot i of every shard
    sits the same key, and its gradient is the sum over them. `arrays` are the device's."""
    length = work.length // ring_size
    order = rj.layouts.get(layout).permute(np.arange(work.length)[None], ring_size, axis=1)[0]
    slot = np.argsort(order) % length  # of each global index in its shard
    mine = order[rank * length : (rank + 1) * length]
    fold = lambda x: reduce(x[order], "(r c) k h -> c k h", "sum", r=ring_size)  # noqa: E731
    asked = []
    for row in sorted({0, work.batch - 1}):
        start, stop = (x[row][mine] for x in work.interval)
        # Keys are judged only where all queries are asked about: the last slots of some shards are early tokens.
        queries, keys = _drawn(start, stop, count, work.seed + row)
        keys = keys if count is None else keys[:0]
        q, k, v, dout = arrays
        asked.append(
            Question(
                row,
                queries,
                keys,
                _host(q[row, queries]),
                _host(k[row])[slot],
                _host(v[row])[slot],
                _host(dout[row, queries]),
                start[queries],
                stop[queries],
                fold,
            )  # fmt: skip
        )
    return asked


def _drawn(start, stop, count: int | None, seed: int):
    """The queries to ask about, ascending, and the keys that none but these see."""
    length = len(start)
    if count is None or 2 * count >= length:
        return np.arange(length), np.arange(length)
    anywhere = np.random.default_rng(seed).choice(length, count, replace=False)
    tail = np.arange(length - count, length)
    queries = np.union1d(anywhere, tail)
    others = np.setdiff1d(np.arange(length), queries)
    highest = stop[others].max()
    return queries, tail[tail >= highest]


def _host(x) -> np.ndarray:
    return np.asarray(jax.device_get(x))
