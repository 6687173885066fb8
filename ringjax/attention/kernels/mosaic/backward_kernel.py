"""Gradients of attention over intervals on Hopper, in two kernels: dQ, and dK with dV.

With the lse of all keys p = exp(s − lse) is final, so both kernels only stream:

    dQ:      a tile of queries stays, the blocks of keys that it meets pass by;
    dK, dV:  a block of keys stays, the tiles of queries that meet it pass by, for every query head of its group.

Neither looks at a block outside the intervals. Each sum is made by one warpgroup in one order, so results repeat to
the last bit; the price is that s and p are computed twice, 7 products in all. One kernel with 5, which adds to dQ
atomically (FlashAttention-3), was slower when written in this dialect: 362 against 488 TFLOP/s (docs/results).
FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ringjax.attention.kernels.base import Gradients, Score
from ringjax.attention.kernels.mosaic import tiles
from ringjax.attention.kernels.mosaic.parts import (
    COLUMN,
    LOG2E,
    ROW,
    bounds,
    compiled_once,
    compiler_params,
    interval_mask,
    interval_mask_transposed,
    per_column,
    per_row,
    probabilities,
    slot_of,
    stream,
    swizzled,
)

BLOCK = 64  # queries or keys of one warpgroup
DQ_KEYS = 64  # of one step
DQ_WARPGROUPS = 3
DKV_WARPGROUPS = 2
STAGES = 2


@compiled_once
def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    lse: Float[Array, "B N T"],
    dout: Float[Array, "B T N Hv"],
    delta: Float[Array, "B N T"],
    lo: Int[Array, "B T"],
    hi: Int[Array, "B T"],
    score: Score,
) -> Gradients:
    """As `reference.backward` without out, in the type of the inputs."""
    keys = k.shape[1]
    tile = DQ_WARPGROUPS * BLOCK
    # In units of log 2, and +∞ where a query sees nothing: its p is 0 whatever its scores are.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    lse, delta = tiles.padded(lse, tile, jnp.inf), tiles.padded(delta, tile, 0)
    queries = q, k, v, dout, lse, delta
    slots = [tiles.padded(x, tile, 0) for x in (lo, hi)]
    by_tile = tiles.key_blocks(tiles.Tiles.of(lo, hi, keys, tile), keys, DQ_KEYS)
    by_block = tiles.query_tiles(tiles.Tiles.of(lo, hi, keys, BLOCK), keys, DKV_WARPGROUPS * BLOCK)
    dq = _dq(*queries, *slots, by_tile.stacked(), score)
    dk, dv = _dkv(*queries, *slots, by_block.stacked(), score)
    return Gradients(dq, dk, dv)


def _dq(q, k, v, dout, lse, delta, lo, hi, blocks, score: Score):
    batch, length, heads, head_dim = q.shape
    groups, v_dim, count = heads // k.shape[2], v.shape[-1], blocks.shape[1]
    return plgpu.kernel(
        functools.partial(_dq_kernel, score=score, groups=groups, count=count),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=dict(
            q_smem=swizzled((DQ_WARPGROUPS, BLOCK, head_dim), q.dtype),
            dout_smem=swizzled((DQ_WARPGROUPS, BLOCK, v_dim), q.dtype),
            k_smem=swizzled((STAGES, DQ_KEYS, head_dim), q.dtype),
            v_smem=swizzled((STAGES, DQ_KEYS, v_dim), q.dtype),
            own_here=plgpu.Barrier(num_arrivals=2, num_barriers=DQ_WARPGROUPS),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_used=plgpu.Barrier(num_arrivals=DQ_WARPGROUPS, num_barriers=STAGES),
            v_used=plgpu.Barrier(num_arrivals=DQ_WARPGROUPS, num_barriers=STAGES),
        ),
        grid=(heads, count, batch),
        grid_names=("heads", "tiles", "batch"),
        num_threads=DQ_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        kernel_name="ringjax_dq",
    )(q, k, v, dout, lse, delta, lo, hi, blocks)


def _dq_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, lo_ref, hi_ref, blocks_ref, dq_ref,
    *, q_smem, dout_smem, k_smem, v_smem, own_here, k_here, v_here, k_used, v_used,
    score: Score, groups: int, count: int,
):  # fmt: skip
    batch, head = lax.axis_index("batch"), lax.axis_index("heads")
    tile = count - 1 - lax.axis_index("tiles")  # under a causal mask the longest first
    warpgroup = lax.axis_index("warpgroup")
    first, full_first, full_stop, stop = bounds(blocks_ref, batch, tile)

    @pl.when(warpgroup < DQ_WARPGROUPS)
    def compute():
        plgpu.set_max_registers(_registers(DQ_WARPGROUPS), action="increase")
        rows = pl.ds((DQ_WARPGROUPS * tile + warpgroup) * BLOCK, BLOCK)
        own_q, own_dout, here = q_smem.at[warpgroup], dout_smem.at[warpgroup], own_here.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], own_q, here)
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, rows, head], own_dout, here)
        lse, delta = (plgpu.load(x.at[batch, head, rows], layout=ROW, optimized=False) for x in (lse_ref, delta_ref))
        lo, hi = (plgpu.load(x.at[batch, rows], layout=ROW, optimized=False) for x in (lo_ref, hi_ref))
        plgpu.barrier_wait(here)

        def attend(dq):
            @pl.loop(first, stop)
            def _(block):
                slot = slot_of(block - first, STAGES)

                def multiply(s_acc, dp_acc):
                    plgpu.barrier_wait(k_here.at[slot])
                    plgpu.wgmma(s_acc, own_q, k_smem.at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(v_here.at[slot])
                    plgpu.wgmma(dp_acc, own_dout, v_smem.at[slot].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    p, slope = probabilities(score, s, per_row(lse, s.shape))
                    p = lax.cond(
                        (block < full_first) | (block >= full_stop),
                        lambda p: jnp.where(interval_mask(p.shape, block * DQ_KEYS, lo, hi), p, 0.0),
                        lambda p: p,
                        p,
                    )
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                    plgpu.barrier_arrive(v_used.at[slot])
                    return (p * (dp - per_row(delta, s.shape)) * slope).astype(k_smem.dtype)

                tile_type = plgpu.ACC((BLOCK, DQ_KEYS), jnp.float32)
                ds = pl.run_scoped(multiply, tile_type, tile_type)
                plgpu.wgmma(dq, ds, k_smem.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_used.at[slot])

            return dq[...]

        dq = pl.run_scoped(attend, plgpu.ACC(own_q.shape, jnp.float32))
        own_q[...] = (dq * score.scale).astype(own_q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, dq_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == DQ_WARPGROUPS)
    def load():
        plgpu.set_max_registers(24, action="decrease")
        kv_head = lax.div(head, groups)

        def fetch(source, stages, here):
            def copy(block, slot):
                rows = source.at[batch, pl.ds(block * DQ_KEYS, DQ_KEYS), kv_head]
                plgpu.copy_gmem_to_smem(rows, stages.at[slot], here.at[slot])

            return copy

        stream(first, stop, STAGES, (fetch(v_ref, v_smem, v_here), v_used), (fetch(k_ref, k_smem, k_here), k_used))


def _dkv(q, k, v, dout, lse, delta, lo, hi, blocks, score: Score):
    batch, _, heads, head_dim = q.shape
    kv_heads, v_dim, count = k.shape[2], v.shape[-1], blocks.shape[1]
    return plgpu.kernel(
        functools.partial(_dkv_kernel, score=score, groups=heads // kv_heads),
        out_type=(jax.ShapeDtypeStruct(k.shape, q.dtype), jax.ShapeDtypeStruct(v.shape, q.dtype)),
        scratch_types=dict(
            k_smem=swizzled((DKV_WARPGROUPS, BLOCK, head_dim), q.dtype),
            v_smem=swizzled((DKV_WARPGROUPS, BLOCK, v_dim), q.dtype),
            q_smem=swizzled((STAGES, BLOCK, head_dim), q.dtype),
            dout_smem=swizzled((STAGES, BLOCK, v_dim), q.dtype),
            lse_smem=plgpu.SMEM((STAGES, BLOCK), jnp.float32),
            delta_smem=plgpu.SMEM((STAGES, BLOCK), jnp.float32),
            own_here=plgpu.Barrier(num_arrivals=2, num_barriers=DKV_WARPGROUPS),
            q_here=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            dout_here=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            q_used=plgpu.Barrier(num_arrivals=DKV_WARPGROUPS, num_barriers=STAGES),
            dout_used=plgpu.Barrier(num_arrivals=DKV_WARPGROUPS, num_barriers=STAGES),
        ),
        grid=(kv_heads, count, batch),
        grid_names=("heads", "blocks", "batch"),
        num_threads=DKV_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        kernel_name="ringjax_dkv",
    )(q, k, v, dout, lse, delta, lo, hi, blocks)


def _dkv_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, lo_ref, hi_ref, blocks_ref, dk_ref, dv_ref,
    *, k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, own_here, q_here, dout_here, q_used, dout_used,
    score: Score, groups: int,
):  # fmt: skip
    batch, kv_head, block = (lax.axis_index(name) for name in ("batch", "heads", "blocks"))
    warpgroup = lax.axis_index("warpgroup")
    first, full_first, full_stop, stop = bounds(blocks_ref, batch, block)
    steps = (stop - first) * groups  # a tile for every query head of the group, then the next tile

    def tile_of(step):
        return first + lax.div(step, groups), kv_head * groups + lax.rem(step, groups)

    @pl.when(warpgroup < DKV_WARPGROUPS)
    def compute():
        plgpu.set_max_registers(_registers(DKV_WARPGROUPS), action="increase")
        start = (DKV_WARPGROUPS * block + warpgroup) * BLOCK
        rows = pl.ds(start, BLOCK)
        own_k, own_v, here = k_smem.at[warpgroup], v_smem.at[warpgroup], own_here.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], own_k, here)
        plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], own_v, here)
        plgpu.barrier_wait(here)

        def attend(dk, dv):
            @pl.loop(0, steps)
            def _(step):
                slot = slot_of(step, STAGES)
                tile, _ = tile_of(step)

                def multiply(s_acc, dp_acc):
                    plgpu.barrier_wait(q_here.at[slot])
                    plgpu.wgmma(s_acc, own_k, q_smem.at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(dout_here.at[slot])
                    plgpu.wgmma(dp_acc, own_v, dout_smem.at[slot].transpose((1, 0)))
                    lse = plgpu.load(lse_smem.at[slot], layout=COLUMN)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    p, slope = probabilities(score, s, per_column(lse, s.shape))

                    def masked(p):
                        queries = pl.ds(tile * BLOCK, BLOCK)
                        lo, hi = (
                            plgpu.load(x.at[batch, queries], layout=COLUMN, optimized=False) for x in (lo_ref, hi_ref)
                        )
                        return jnp.where(interval_mask_transposed(p.shape, start, lo, hi), p, 0.0)

                    p = lax.cond((tile < full_first) | (tile >= full_stop), masked, lambda p: p, p)
                    plgpu.wgmma(dv, p.astype(q_smem.dtype), dout_smem.at[slot])
                    delta = plgpu.load(delta_smem.at[slot], layout=COLUMN)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)  # while p · dout goes on
                    return (p * (dp - per_column(delta, s.shape)) * slope).astype(q_smem.dtype)

                tile_type = plgpu.ACC((BLOCK, BLOCK), jnp.float32)
                ds = pl.run_scoped(multiply, tile_type, tile_type)
                plgpu.wgmma(dk, ds, q_smem.at[slot])
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(dout_used.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_used.at[slot])

            return dk[...], dv[...]

        sums = plgpu.ACC(own_k.shape, jnp.float32), plgpu.ACC(own_v.shape, jnp.float32)
        dk, dv = pl.run_scoped(attend, *sums)
        own_k[...] = (dk * score.scale).astype(own_k.dtype)
        own_v[...] = dv.astype(own_v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_k, dk_ref.at[batch, rows, kv_head])
        plgpu.copy_smem_to_gmem(own_v, dv_ref.at[batch, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == DKV_WARPGROUPS)
    def load():
        plgpu.set_max_registers(24, action="decrease")

        def fetch(source, stages, row_source, row_stages, here):
            def copy(step, slot):
                tile, head = tile_of(step)
                queries = pl.ds(tile * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(source.at[batch, queries, head], stages.at[slot], here.at[slot])
                plgpu.copy_gmem_to_smem(row_source.at[batch, head, queries], row_stages.at[slot], here.at[slot])

            return copy

        stream(
            0, steps, STAGES,
            (fetch(dout_ref, dout_smem, delta_ref, delta_smem, dout_here), dout_used),
            (fetch(q_ref, q_smem, lse_ref, lse_smem, q_here), q_used),
        )  # fmt: skip


def _registers(warpgroups: int) -> int:
    """What a thread may have when the loading warpgroup keeps 24 of the 65536 of a multiprocessor."""
    return {1: 240, 2: 240, 3: 160}[warpgroups]
