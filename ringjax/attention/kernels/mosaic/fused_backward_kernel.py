"""All gradients of attention over intervals on Hopper in one kernel, with dQ summed by atomic additions.

A block of keys stays, the tiles of queries that meet it pass by, as for dK and dV alone; here each pass also adds
what the block gives to the tile's dQ into a float32 array in global memory. s and p are computed once: 5 products
where the two kernels of `backward_kernel` have 7. The order in which blocks add to dQ varies from run to run, so
its last float32 bits do too.

Both warpgroups own 64 keys. For dQ they exchange ds through shared memory and each takes half of the columns:

    dQ[64 queries, half of H] += ds[64 queries, 128 keys] · K[128 keys, half of H]

FlashAttention-3, Shah et al. 2024, arXiv:2407.08608, §B.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ringjax.attention.kernels.base import Score
from ringjax.attention.kernels.mosaic.parts import (
    COLUMN,
    bounds,
    compiler_params,
    interval_mask_transposed,
    per_column,
    probabilities,
    slot_of,
    stream,
    swizzled,
)

BLOCK = 64  # keys of one warpgroup, and queries of one step
WARPGROUPS = 2
STAGES = 2
HEAD_DIM = 128
HALF = HEAD_DIM // WARPGROUPS


def gradients(q, k, v, dout, lse, delta, lo, hi, blocks, score: Score):
    """dq (float32), dk and dv (in the type of the inputs); the arguments are those of `backward_kernel._dkv`."""
    batch, _, heads, _ = q.shape
    kv_heads, count = k.shape[2], blocks.shape[1]
    dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32))
    dk, dv = plgpu.kernel(
        functools.partial(_kernel, score=score, groups=heads // kv_heads),
        out_type=(jax.ShapeDtypeStruct(k.shape, q.dtype), jax.ShapeDtypeStruct(v.shape, q.dtype)),
        scratch_types=dict(
            k_smem=swizzled((WARPGROUPS, WARPGROUPS, BLOCK, HALF), q.dtype),  # halves of H, warpgroups' keys
            v_smem=swizzled((WARPGROUPS, BLOCK, HEAD_DIM), q.dtype),
            q_smem=swizzled((STAGES, BLOCK, HEAD_DIM), q.dtype),
            dout_smem=swizzled((STAGES, BLOCK, HEAD_DIM), q.dtype),
            lse_smem=plgpu.SMEM((STAGES, BLOCK), jnp.float32),
            delta_smem=plgpu.SMEM((STAGES, BLOCK), jnp.float32),
            ds_smem=swizzled((WARPGROUPS, BLOCK, BLOCK), q.dtype),
            dq_smem=swizzled((WARPGROUPS, BLOCK, HALF), jnp.float32),
            own_here=plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
            q_here=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            dout_here=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            q_used=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            dout_used=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            k_here=plgpu.Barrier(num_arrivals=WARPGROUPS),
            ds_here=plgpu.Barrier(num_arrivals=WARPGROUPS),
            ds_used=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(kv_heads, count, batch),
        grid_names=("heads", "blocks", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        kernel_name="ringjax_backward",
    )(q, k, v, dout, lse, delta, lo, hi, blocks, dq)
    return dq[...], dk, dv


def _kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, lo_ref, hi_ref, blocks_ref, dq_ref, dk_ref, dv_ref,
    *, k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, ds_smem, dq_smem,
    own_here, q_here, dout_here, q_used, dout_used, k_here, ds_here, ds_used, score: Score, groups: int,
):  # fmt: skip
    batch, kv_head, block = (lax.axis_index(name) for name in ("batch", "heads", "blocks"))
    warpgroup = lax.axis_index("warpgroup")
    first, full_first, full_stop, stop = bounds(blocks_ref, batch, block)
    steps = (stop - first) * groups  # a tile for every query head of the group, then the next tile

    def tile_of(step):
        return first + lax.div(step, groups), kv_head * groups + lax.rem(step, groups)

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        start = (WARPGROUPS * block + warpgroup) * BLOCK
        rows = pl.ds(start, BLOCK)
        own_v, own_dq, here = v_smem.at[warpgroup], dq_smem.at[warpgroup], own_here.at[warpgroup]
        for half in range(2):
            columns = pl.ds(half * HALF, HALF)
            plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head, columns], k_smem.at[half, warpgroup], here)
        plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], own_v, here)
        plgpu.barrier_wait(here)
        # The other warpgroup's keys are read too.
        plgpu.barrier_arrive(k_here)
        plgpu.barrier_wait(k_here)

        def attend(dk, dv):
            @pl.loop(0, steps)
            def _(step):
                slot = slot_of(step, STAGES)
                tile, head = tile_of(step)
                queries = pl.ds(tile * BLOCK, BLOCK)

                def multiply(s_acc, dp_acc):
                    plgpu.barrier_wait(q_here.at[slot])
                    for half in range(2):
                        own_k = k_smem.at[half, warpgroup]
                        q_half = q_smem.at[slot, :, pl.ds(half * HALF, HALF)]
                        plgpu.wgmma(s_acc, own_k, q_half.transpose((1, 0)))
                    plgpu.barrier_wait(dout_here.at[slot])
                    plgpu.wgmma(dp_acc, own_v, dout_smem.at[slot].transpose((1, 0)))
                    lse = plgpu.load(lse_smem.at[slot], layout=COLUMN)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    p, slope = probabilities(score, s, per_column(lse, s.shape))

                    def masked(p):
                        lo, hi = (
                            plgpu.load(x.at[batch, queries], layout=COLUMN, optimized=False) for x in (lo_ref, hi_ref)
                        )
                        return jnp.where(interval_mask_transposed(p.shape, start, lo, hi), p, 0.0)

                    p = lax.cond((tile < full_first) | (tile >= full_stop), masked, lambda p: p, p)
                    plgpu.wgmma(dv, p.astype(q_smem.dtype), dout_smem.at[slot])
                    delta = plgpu.load(delta_smem.at[slot], layout=COLUMN)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)  # while p · dout goes on
                    return (p * (dp - per_column(delta, s.shape)) * slope).astype(q_smem.dtype)

                square = plgpu.ACC((BLOCK, BLOCK), jnp.float32)
                ds = pl.run_scoped(multiply, square, square)

                @pl.when(step > 0)
                def _():
                    plgpu.barrier_wait(ds_used)

                ds_smem.at[warpgroup][...] = ds
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_here)
                plgpu.wgmma(dk, ds, q_smem.at[slot])
                plgpu.barrier_wait(ds_here)

                def multiply_dq(dq_acc):
                    for other in range(WARPGROUPS):
                        plgpu.wgmma(dq_acc, ds_smem.at[other].transpose((1, 0)), k_smem.at[warpgroup, other])
                    return plgpu.wgmma_accumulator_load(dq_acc, wait_n=0)

                dq = pl.run_scoped(multiply_dq, plgpu.ACC((BLOCK, HALF), jnp.float32))
                for used in (dout_used.at[slot], q_used.at[slot], ds_used):
                    plgpu.barrier_arrive(used)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                own_dq[...] = dq
                plgpu.commit_smem()
                columns = pl.ds(warpgroup * HALF, HALF)
                plgpu.copy_smem_to_gmem(own_dq, dq_ref.at[batch, queries, head, columns], reduction_op="add")

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_wait(ds_used)

            return dk[...], dv[...]

        sums = plgpu.ACC((BLOCK, HEAD_DIM), jnp.float32)
        dk, dv = pl.run_scoped(attend, sums, sums)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dk = (dk * score.scale).astype(k_smem.dtype)
        # All products with K are done: the last wait on `ds_used` was for both warpgroups.
        for half in range(2):
            k_smem.at[half, warpgroup][...] = dk[:, half * HALF : (half + 1) * HALF]
        own_v[...] = dv.astype(own_v.dtype)
        plgpu.commit_smem()
        for half in range(2):
            columns = pl.ds(half * HALF, HALF)
            plgpu.copy_smem_to_gmem(k_smem.at[half, warpgroup], dk_ref.at[batch, rows, kv_head, columns])
        plgpu.copy_smem_to_gmem(own_v, dv_ref.at[batch, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
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
            (fetch(q_ref, q_smem, lse_ref, lse_smem, q_here), q_used),
            (fetch(dout_ref, dout_smem, delta_ref, delta_smem, dout_here), dout_used),
        )  # fmt: skip
