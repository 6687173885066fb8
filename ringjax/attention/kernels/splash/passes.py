"""The three Pallas kernels: forward, dQ, and dK with dV (Dao 2023, arXiv:2307.08691, on a TPU's terms).

In all three a block of scores has keys along sublanes and queries along lanes, `[keys, queries]`. So what belongs to a
query (its interval, peak, lse, delta) is one row `[1, queries]`: reductions over keys run down the sublanes, the cheap
way, and no statistic is stored 128 times over to fill the lanes. What is summed over keys comes out as
`[head size, queries]` and is turned once a tile.

A grid is (heads, visits): see `visits.py`. A K/V head serves its group of query heads by index and is never copied.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ringjax.attention.kernels.base import Score
from ringjax.attention.kernels.splash.visits import Order, Visits

LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # in place of −inf: the difference of two of it is no NaN


def forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S Hv"],
    lo: Int[Array, "B 1 1 T"],
    hi: Int[Array, "B 1 1 T"],
    score: Score,
    order: Order,
    visits: Visits,
    interpret: Any,
) -> tuple[Float[Array, "B N T Hv"], Float[Array, "B N 1 T"]]:
    """out and lse, float32; `order` is by queries. T and S are padded."""
    (batch, heads, length, head_dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[-1]
    spec, tile = Specs(order, heads // kv_heads), order.queries.size
    return _call(
        functools.partial(_forward, order, score),
        "splash_forward",
        (heads, visits.count),
        visits,
        [
            (q, spec.queries(head_dim)), (k, spec.keys(head_dim)), (v, spec.keys(v_dim)),
            (lo, spec.interval()), (hi, spec.interval()),
        ],
        [((batch, heads, length, v_dim), spec.queries(v_dim)), ((batch, heads, 1, length), spec.statistic())],
        scratch=[(v_dim, tile), (1, tile), (1, tile)],
        products=head_dim + v_dim,
        interpret=interpret,
    )  # fmt: skip


def backward_queries(
    q, k, v, lse, dout, delta, lo, hi, score: Score, order: Order, visits: Visits, interpret: Any
) -> Float[Array, "B N T H"]:
    """dQ, float32, from lse and delta `[B, N, 1, T]`; `order` is by queries."""
    (_, heads, _, head_dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[-1]
    spec = Specs(order, heads // kv_heads)
    (dq,) = _call(
        functools.partial(_backward_queries, order, score),
        "splash_dq",
        (heads, visits.count),
        visits,
        _backward_inputs(spec, q, k, v, lse, dout, delta, lo, hi),
        [(q.shape, spec.queries(head_dim))],
        scratch=[(head_dim, order.queries.size)],
        products=2 * head_dim + v_dim,
        interpret=interpret,
    )
    return dq


def backward_keys(
    q, k, v, lse, dout, delta, lo, hi, score: Score, order: Order, visits: Visits, interpret: Any
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
    """dK and dV, float32, from lse and delta `[B, N, 1, T]`; `order` is by keys. Each visit is made by every query
    head of the group in turn."""
    heads, (_, kv_heads, _, head_dim), v_dim = q.shape[1], k.shape, v.shape[-1]
    spec, block = Specs(order, heads // kv_heads), order.keys.size
    return _call(
        functools.partial(_backward_keys, order, score),
        "splash_dkv",
        (kv_heads, visits.count, heads // kv_heads),
        visits,
        _backward_inputs(spec, q, k, v, lse, dout, delta, lo, hi),
        [(k.shape, spec.keys(head_dim)), (v.shape, spec.keys(v_dim))],
        scratch=[(block, head_dim), (block, v_dim)],
        products=2 * head_dim + 2 * v_dim,
        interpret=interpret,
    )


def _forward(order: Order, score: Score, codes, q, k, v, lo, hi, out, lse, summed, total, peak) -> None:
    visit = Visit.of(order, codes)

    @pl.when(visit.first)
    def start():
        summed[...] = jnp.zeros_like(summed)
        total[...] = jnp.zeros_like(total)
        peak[...] = jnp.full_like(peak, LOWEST)

    @visit.attend
    def attend(masked: bool):
        scores = score(_product(k, q, (1, 1)))
        if masked:
            scores = jnp.where(visit.visible(scores, lo, hi), scores, LOWEST)
        higher = jnp.maximum(peak[...], jnp.max(scores, axis=0, keepdims=True))
        level = jnp.where(higher == LOWEST, 0, higher)  # a query that saw no key yet: exp(LOWEST) is 0
        weights, decay = jnp.exp(scores - level), jnp.exp(peak[...] - level)
        total[...] = total[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        summed[...] = summed[...] * decay + _product(v, weights, (0, 0))
        peak[...] = higher

    @pl.when(visit.last)
    def finish():
        seen = total[...] > 0
        some = jnp.where(seen, total[...], 1)
        out[...] = (summed[...] / some).T
        lse[...] = jnp.where(seen, peak[...] + jnp.log(some), -jnp.inf)


def _backward_queries(order: Order, score: Score, codes, q, k, v, lse, dout, delta, lo, hi, dq, summed) -> None:
    visit = Visit.of(order, codes)

    @pl.when(visit.first)
    def start():
        summed[...] = jnp.zeros_like(summed)

    @visit.attend
    def attend(masked: bool):
        _, ds = _probabilities(visit, masked, score, q, k, v, lse, dout, delta, lo, hi)
        summed[...] += _product(k, ds, (0, 0))

    @pl.when(visit.last)
    def finish():
        dq[...] = summed[...].T


def _backward_keys(
    order: Order, score: Score, codes, q, k, v, lse, dout, delta, lo, hi, dk, dv, dk_sum, dv_sum
) -> None:
    visit = Visit.of(order, codes, member=pl.program_id(2), members=pl.num_programs(2))

    @pl.when(visit.first)
    def start():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @visit.attend
    def attend(masked: bool):
        p, ds = _probabilities(visit, masked, score, q, k, v, lse, dout, delta, lo, hi)
        dv_sum[...] += _product(p, dout, (1, 0))
        dk_sum[...] += _product(ds, q, (1, 0))

    @pl.when(visit.last)
    def finish():
        dk[...] = dk_sum[...]
        dv[...] = dv_sum[...]


def _probabilities(visit: "Visit", masked: bool, score: Score, q, k, v, lse, dout, delta, lo, hi):
    """p = exp(s − lse) and ds = p (dout · v − delta) · (d score), both `[keys, queries]`."""
    scores = score(_product(k, q, (1, 1)))
    p = jnp.exp(scores - lse[...])
    if masked:
        p = jnp.where(visit.visible(p, lo, hi), p, 0)
    return p, p * (_product(v, dout, (1, 1)) - delta[...]) * score.gradient(scores)


def _product(a, b, contracted: tuple[int, int]) -> Float[Array, "I J"]:
    """A matrix product with its sum in float32, of factors in the inputs' type (that of `a` or `b` which is a Ref)."""
    dtype = jnp.bfloat16 if jnp.bfloat16 in (a.dtype, b.dtype) else jnp.float32
    precision = None if dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    axes = ((contracted[0],), (contracted[1],)), ((), ())
    return lax.dot_general(
        a[...].astype(dtype), b[...].astype(dtype), axes, precision=precision, preferred_element_type=jnp.float32
    )


@dataclasses.dataclass(frozen=True)
class Visit:
    """What this step of the grid does: `first` and `last` of the steps that add to one result start and finish it."""

    first: Any
    last: Any
    whole: Any
    first_key: Any

    @classmethod
    def of(cls, order: Order, codes, member: Any = 0, members: Any = 1) -> "Visit":
        step, steps = pl.program_id(1), pl.num_programs(1)
        here, before, after = codes[step], codes[jnp.maximum(step - 1, 0)], codes[jnp.minimum(step + 1, steps - 1)]
        starts = (step == 0) | (order.result(before) != order.result(here))
        finishes = (step == steps - 1) | (order.result(after) != order.result(here))
        return cls(
            starts & (member == 0), finishes & (member == members - 1), order.whole(here),
            order.block(here) * order.keys.size,
        )  # fmt: skip

    def attend(self, function) -> None:
        """Runs `function(masked)`: two versions of the code, one without a mask for blocks that are seen whole."""
        pl.when(self.whole)(functools.partial(function, False))
        pl.when(jnp.logical_not(self.whole))(functools.partial(function, True))

    def visible(self, scores, lo, hi):
        slot = self.first_key + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        return (slot >= lo[...]) & (slot < hi[...])


class Place(NamedTuple):
    """Where in the arrays a step of the grid is: (head, visit), or (K/V head, visit, member of its group) by keys."""

    row: Any
    head: Any
    kv_head: Any
    tile: Any
    block: Any


@dataclasses.dataclass(frozen=True)
class Specs:
    """Which part of each array a step of the grid works on. Axes of size 1 keep the last two as a TPU wants them."""

    order: Order
    group: int

    def queries(self, dim: int) -> pl.BlockSpec:
        return self._spec((self.order.queries.size, dim), lambda at: (at.row, at.head, at.tile, 0))

    def keys(self, dim: int) -> pl.BlockSpec:
        return self._spec((self.order.keys.size, dim), lambda at: (at.row, at.kv_head, at.block, 0))

    def statistic(self) -> pl.BlockSpec:
        return self._spec((1, self.order.queries.size), lambda at: (at.row, at.head, 0, at.tile))

    def interval(self) -> pl.BlockSpec:
        return self._spec((1, self.order.queries.size), lambda at: (at.row, 0, 0, at.tile))

    def _spec(self, shape, index) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda *step: index(self._place(*step)))

    def _place(self, head, step, *rest) -> Place:
        *member, codes = rest
        kv_head = head if member else lax.div(head, self.group)
        head = head * self.group + member[0] if member else head
        code = codes[step]
        return Place(self.order.row(code), head, kv_head, self.order.tile(code), self.order.block(code))


def _call(kernel, name: str, grid, visits: Visits, inputs, outputs, *, scratch, products: int, interpret: Any):
    """`pallas_call` with (array, spec) inputs and (shape, spec) outputs, all float32."""
    arrays, in_specs = zip(*inputs)
    shapes, out_specs = zip(*outputs)
    varying = jax.typeof(arrays[0]).manual_axis_type  # inside shard_map, results vary as the inputs do
    results = [jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying) for shape in shapes]
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) + ("arbitrary",) * (len(grid) - 1),
        ),
        cost_estimate=_cost(arrays, results, products),
        interpret=interpret,
    )(visits.codes, *arrays)


def _cost(arrays, results, products: int) -> pl.CostEstimate:
    """What XLA's scheduler believes the call takes, as it decides what to hide behind it: that of a causal mask, for
    the visits are data. `products` is the sum of the head sizes of the matrix products of a score."""
    (batch, heads, length, _), slots = arrays[0].shape, arrays[1].shape[2]
    pairs = batch * heads * length * slots // 2
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *results))
    return pl.CostEstimate(flops=2 * pairs * products, transcendentals=pairs, bytes_accessed=moved)


def _backward_inputs(spec: Specs, q, k, v, lse, dout, delta, lo, hi):
    per_query, interval = spec.statistic(), spec.interval()
    return [
        (q, spec.queries(q.shape[-1])), (k, spec.keys(k.shape[-1])), (v, spec.keys(v.shape[-1])), (lse, per_query),
        (dout, spec.queries(dout.shape[-1])), (delta, per_query), (lo, interval), (hi, interval),
    ]  # fmt: skip
