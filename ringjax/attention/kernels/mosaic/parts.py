"""What the kernels for Hopper share: sizes, register layouts and the mask of an interval.

Rows of a score tile are queries in the forward pass and for dQ; for dK and dV rows are keys and columns are queries.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ringjax.attention.kernels.base import Score

COMPUTE_WARPGROUPS = 2
LOG2E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
ROW, COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


def compiled_once(function: Callable, static: Sequence[str] = ("score",)) -> Callable:
    """All layers of a program share one kernel. Traced apart, each layer's would get a number of its own in its module,
    and each module takes about a second to compile."""
    return jax.jit(function, static_argnames=static)


def swizzled(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory in the tiling that the matrix units read without bank conflicts."""
    per_line = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, per_line)), plgpu.SwizzleTransform(128))
    )


def compiler_params(**options) -> plgpu.CompilerParams:
    """With the hardware's own exp2 and tanh, whose errors are far below bfloat16's."""
    return plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **options
    )


def slot_of(step, stages: int):
    """The stage of shared memory that step `step` of a loop uses."""
    return lax.rem(jnp.asarray(step, jnp.int32), jnp.asarray(stages, jnp.int32))


def bounds(blocks_ref, batch, tile) -> tuple:
    """first, full_first, full_stop and stop of `tiles.Blocks`."""
    # Inside `shard_map` a value that is read has a type that names mesh axes, which loops here cannot carry; the
    # addition, done without that bookkeeping, returns a plain number.
    return tuple(blocks_ref[batch, tile, i] + jnp.int32(0) for i in range(4))


def stream(first, stop, stages: int, *arrays: tuple[Callable, object]) -> None:
    """The loading warpgroup: for the steps first … stop − 1 and each `(fetch, used)` of `arrays`, `fetch(step, slot)`
    as soon as the slot is free.

    Every reader of a slot arrives at the barrier `used` when it has done with it.
    """
    for slot in range(stages):

        @pl.when(first + slot < stop)
        def _(slot=slot):
            for fetch, _ in arrays:
                fetch(first + slot, slot)

    @pl.loop(first + stages, jnp.maximum(stop, first + stages))
    def _(step):
        slot = slot_of(step - first, stages)
        for fetch, used in arrays:
            plgpu.barrier_wait(used.at[slot])
            fetch(step, slot)

    # The last arrivals are waited for too: a barrier must not outlive a phase that nobody saw.
    @pl.loop(jnp.maximum(stop - stages, first), stop)
    def _(step):
        for _, used in arrays:
            plgpu.barrier_wait(used.at[slot_of(step - first, stages)])


def per_row(x, shape: tuple[int, int]):
    """One value a row, for every column."""
    return lax.broadcast_in_dim(x, shape, [0])


def per_column(x, shape: tuple[int, int]):
    """One value a column, for every row."""
    return lax.broadcast_in_dim(x, shape, [1])


def interval_mask(shape: tuple[int, int], first_key, lo, hi):
    """Which keys (columns, from `first_key`) each query (row) sees."""
    key = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    return (key >= per_row(lo, shape)) & (key < per_row(hi, shape))


def interval_mask_transposed(shape: tuple[int, int], first_key, lo, hi):
    """The same with keys as rows and queries as columns."""
    key = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
    return (key >= per_column(lo, shape)) & (key < per_column(hi, shape))


def probabilities(score: Score, products, lse):
    """p = exp(s − lse) from q · k, and the slope of s beside `scale` by which ds is multiplied (1 without softcap)."""
    if score.softcap is None:
        return jnp.exp2(products * (score.scale * LOG2E) - lse), 1.0
    bent = jnp.tanh(products * (score.scale / score.softcap))
    return jnp.exp2(bent * (score.softcap * LOG2E) - lse), 1 - bent * bent
