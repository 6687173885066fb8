"""One hop: the local queries attend to the keys and values that are visiting.

Which kernel does it depends on what is known of the mask. Where a hop is a rectangle (`patterns.py`) a fused kernel for
rectangles takes it; else a kernel for intervals takes lo and hi of each query. A device of a ring knows only at run
time whether its keys come from an earlier or a later shard, so the possible cases are the branches of a `lax.switch`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ringjax.attention.kernels.base import Gradients, Kernels, Score, accumulator, target, varying_like
from ringjax.attention.merge import Partial, empty, merge
from ringjax.attention.patterns import Pattern

INTERVAL = "interval"
Case = Pattern | str | None


@dataclasses.dataclass(frozen=True)
class Cases:
    """What a hop may be: a pattern, `INTERVAL`, or None where no local query sees a visiting key; `index` says which
    (None: there is but one)."""

    branches: tuple[Case, ...]
    index: Int[Array, ""] | Bool[Array, ""] | None = None

    @classmethod
    def of(cls, branches: list[Case], index) -> "Cases":
        """The case at `index` of `branches`, of which those that are equal become one."""
        distinct = tuple(dict.fromkeys(branches))
        if len(distinct) == 1:
            return cls(distinct)
        if len(distinct) < len(branches):
            places = jnp.asarray([distinct.index(branch) for branch in branches], jnp.int32)
            index = places[jnp.asarray(index, jnp.int32)]
        return cls(distinct, index)

    def run(self, function, arriving, *arrays):
        """`function(case, arriving, *arrays) -> results, arriving` of the case that it is; the results vary over the
        mesh as the arrays do."""

        def branch(case, arriving, *arrays):
            results, arriving = function(case, arriving, *arrays)
            return varying_like(results, *arrays), arriving

        with jax.named_scope("ring/attend"):
            if len(self.branches) == 1:
                return branch(self.branches[0], arriving, *arrays)
            # Only the compute is conditional: all devices must reach every rotation, and it must not be awaited first.
            branches = [lambda *arrays, case=case: branch(case, None, *arrays)[0] for case in self.branches]
            results = lax.switch(jnp.asarray(self.index, jnp.int32), branches, *arrays)
            return _together(results, arriving)


def _together(results, arriving):
    """Both, when both are there: what comes after them (merging, adding up) begins then.

    XLA's scheduler for TPUs starts a transfer as late as it thinks it may, and takes each message to have the links to
    itself. Without this it hides K and V behind the merge on v5p and v6e, which is shorter than the two of them, and
    leaves nothing between their start and end but that (docs/results/tpu_overlap.md).
    """
    if arriving is None or target().platform != "tpu":
        return results, arriving
    return lax.optimization_barrier((results, arriving))


def forward(
    cases: Cases, kernels: Kernels, score: Score, partial: Partial | None, q, k, v, lo, hi, dtype, arriving=None
) -> tuple[Partial, Any]:
    """`partial` (None: nothing yet) merged with attention to the visiting k and v; its out has type `dtype` (None: as
    the kernels give it). And `arriving`, what is on its way meanwhile, when it is here (`_together`)."""
    _require(kernels, cases)
    if dtype is None and len(cases.branches) > 1:
        dtype = q.dtype if kernels.fused else accumulator(q, k, v)

    def attend(case: Case, arriving, partial, q, k, v, lo, hi):
        seen = None
        if case == INTERVAL:
            seen = Partial(*kernels.interval.forward(q, k, v, lo, hi, score))
        elif case is not None:
            part = case.rows(q, 1), case.columns(k, 1), case.columns(v, 1)
            seen = Partial(*kernels.dense.dense.forward(*part, case.causal, score))
        seen, arriving = _together(seen, arriving)
        with jax.named_scope("ring/merge"):
            out, lse = _merge_rows(partial, seen, case, lambda: empty(*q.shape[:3], v.shape[-1], accumulator(q)))
        return Partial(out if dtype is None else out.astype(dtype), lse), arriving

    return cases.run(attend, arriving, partial, q, k, v, lo, hi)


def backward(
    cases: Cases, kernels: Kernels, score: Score, dq, q, k, v, out, lse, dout, delta, lo, hi, dtype, arriving=None
) -> tuple[Gradients, Any]:
    """dq (None: nothing yet) with what the visiting k and v add to it, and the gradients of these k and v.

    dq is returned in `dtype` (None: as the kernels give it). `arriving` as in `forward`.
    """
    _require(kernels, cases)
    wide = accumulator(q, k, v)
    kv_dtype = None
    if len(cases.branches) > 1:  # they must agree on one type
        kv_dtype = k.dtype if kernels.fused else wide
        dtype = kv_dtype if dtype is None else dtype

    def differentiate(case: Case, arriving, dq, q, k, v, out, lse, dout, delta, lo, hi):
        if case is None:
            dq = jnp.zeros(q.shape, wide) if dq is None else dq
            grads = Gradients(dq, jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
        elif case == INTERVAL:
            grads = kernels.interval.backward(q, k, v, out, lse, dout, delta, lo, hi, score)
            grads, arriving = _together(grads, arriving)
            grads = grads if dq is None else grads._replace(dq=dq.astype(wide) + grads.dq)
        else:
            queries = (case.rows(x, axis) for x, axis in ((out, 1), (lse, 2), (dout, 1), (delta, 2)))
            part = case.rows(q, 1), case.columns(k, 1), case.columns(v, 1)
            grads = kernels.dense.dense.backward(*part, *queries, case.causal, score)
            grads, arriving = _together(grads, arriving)
            if dq is None:
                dq = _spread(grads.dq, case.queries, q)
            else:
                dq = _add_part(dq, grads.dq.astype(wide), case.queries)
            grads = Gradients(dq, *(_spread(x, case.keys, k) for x in grads[1:]))
        dq_sum, dk, dv = grads
        grads = Gradients(
            dq_sum if dtype is None else dq_sum.astype(dtype),
            *(x if kv_dtype is None else x.astype(kv_dtype) for x in (dk, dv)),
        )
        return grads, arriving

    return cases.run(differentiate, arriving, dq, q, k, v, out, lse, dout, delta, lo, hi)


def _merge_rows(partial: Partial | None, seen: Partial | None, case: Case, nothing) -> Partial:
    """`merge`, of those queries that the case is about; the others keep what they have."""
    if seen is None:
        return nothing() if partial is None else partial
    if case == INTERVAL or case.length == (seen if partial is None else partial).out.shape[1]:
        return seen if partial is None else merge(partial, seen)
    if partial is None:
        raise ValueError(f"the first hop must give every query a result, not those of {case} alone")
    merged = merge(Partial(case.rows(partial.out, 1), case.rows(partial.lse, 2)), seen)
    return Partial(
        _replace(partial.out, merged.out, case.queries, 1), _replace(partial.lse, merged.lse, case.queries, 2)
    )


def _spread(part, bounds: tuple[int, int], like):
    """`part` at slots `bounds` of axis 1 and zeros elsewhere, as long as `like`."""
    sides = bounds[0], like.shape[1] - bounds[1]
    return jnp.pad(part, [(0, 0), sides] + [(0, 0)] * (part.ndim - 2)) if any(sides) else part


def _add_part(whole, part, bounds: tuple[int, int]):
    """`whole`, in `part`'s type, with `part` added at slots `bounds` of axis 1."""
    if bounds == (0, whole.shape[1]):
        return whole.astype(part.dtype) + part
    return _replace(whole, whole[:, slice(*bounds)].astype(part.dtype) + part, bounds, 1)


def _replace(whole, part, bounds: tuple[int, int], axis: int):
    """`whole` in `part`'s type, with `part` at slots `bounds` of `axis`."""
    before, after = (
        lax.slice_in_dim(whole, *side, axis=axis).astype(part.dtype)
        for side in ((0, bounds[0]), (bounds[1], whole.shape[axis]))
    )
    return jnp.concatenate([before, part, after], axis=axis)


def _require(kernels: Kernels, cases: Cases) -> None:
    if INTERVAL in cases.branches and kernels.interval is None:
        raise NotImplementedError(
            f"backend {kernels.dense.name!r} serves hops in which every query sees every key, or a causal part; this"
            " call's mask is data, a window, or the layout mixes the two; use backend='auto'"
        )
