"""Attention over intervals on Hopper: FlashAttention-3's forward pass in Pallas (Shah et al. 2024, arXiv:2407.08608).

A block of threads has two warpgroups that compute and one that loads. Each of the two owns 64 queries; K and V stream
through shared memory in blocks that both use. A barrier lets them take turns: while one multiplies, the other does its
softmax.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ringjax.attention.kernels.base import Score
from ringjax.attention.kernels.mosaic import tiles
from ringjax.attention.kernels.mosaic.parts import (
    COMPUTE_WARPGROUPS,
    LOG2E,
    ROW,
    WGMMA,
    bounds,
    compiled_once,
    compiler_params,
    interval_mask,
    per_row,
    slot_of,
    stream,
    swizzled,
)
from ringjax.attention.merge import Partial

BLOCK_Q = 64  # of one warpgroup
BLOCK_KV = 128
STAGES = 2
# Below every score and finite, so that a row whose keys are all masked so far has no ∞ − ∞.
LOWEST = -1e30


@compiled_once
def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    lo: Int[Array, "B T"],
    hi: Int[Array, "B T"],
    score: Score,
) -> Partial:
    """As `reference.forward`; out in the type of the inputs, lse float32."""
    batch, length, heads, head_dim = q.shape
    keys, groups, v_dim = k.shape[1], heads // k.shape[2], v.shape[-1]
    tile = COMPUTE_WARPGROUPS * BLOCK_Q
    count = pl.cdiv(length, tile)
    blocks = tiles.key_blocks(tiles.Tiles.of(lo, hi, keys, tile), keys, BLOCK_KV)
    lo, hi = (tiles.padded(x, tile, 0) for x in (lo, hi))
    body = functools.partial(_kernel, score=score, groups=groups, count=count, dtype=q.dtype)
    out, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, v_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, count * tile), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=swizzled((COMPUTE_WARPGROUPS, BLOCK_Q, head_dim), q.dtype),
            out_smem=swizzled((COMPUTE_WARPGROUPS, BLOCK_Q, v_dim), q.dtype),
            lse_smem=plgpu.SMEM((COMPUTE_WARPGROUPS, BLOCK_Q), jnp.float32),
            k_smem=swizzled((STAGES, BLOCK_KV, head_dim), k.dtype),
            v_smem=swizzled((STAGES, BLOCK_KV, v_dim), v.dtype),
            q_here=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_used=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=STAGES),
            v_used=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=STAGES),
            turn=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ),
        grid=(heads, count, batch),
        grid_names=("heads", "tiles", "batch"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        kernel_name="ringjax_forward",
    )(q, k, v, lo, hi, blocks.stacked())
    return Partial(out, lse[..., :length])


def _kernel(
    q_ref, k_ref, v_ref, lo_ref, hi_ref, blocks_ref, out_ref, lse_ref,
    *, q_smem, out_smem, lse_smem, k_smem, v_smem, q_here, k_here, v_here, k_used, v_used, turn,
    score: Score, groups: int, count: int, dtype,
):  # fmt: skip
    batch, head = lax.axis_index("batch"), lax.axis_index("heads")
    # Under a causal mask the last tiles have most to do: they start first.
    tile = count - 1 - lax.axis_index("tiles")
    warpgroup = lax.axis_index("warpgroup")
    first, full_first, full_stop, stop = bounds(blocks_ref, batch, tile)
    start = (COMPUTE_WARPGROUPS * tile + warpgroup) * BLOCK_Q

    def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        plgpu.set_max_registers(232, action="increase")
        own_q, own_out, own_lse = q_smem.at[warpgroup], out_smem.at[warpgroup], lse_smem.at[warpgroup]
        rows = pl.ds(start, BLOCK_Q)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], own_q, q_here.at[warpgroup])
        lo, hi = (plgpu.load(ref.at[batch, rows], layout=ROW, optimized=False) for ref in (lo_ref, hi_ref))
        plgpu.barrier_wait(q_here.at[warpgroup])
        peak = plgpu.layout_cast(jnp.full((BLOCK_Q,), LOWEST, jnp.float32), ROW)
        total = plgpu.layout_cast(jnp.zeros((BLOCK_Q,), jnp.float32), ROW)
        summed = plgpu.layout_cast(jnp.zeros(own_out.shape, jnp.float32), WGMMA)

        @pl.when(first < stop)
        def _():
            plgpu.barrier_wait(k_here.at[slot_of(0, STAGES)])

        pl.when(warpgroup == 1)(take_turn)

        def attend(block, carry):
            summed, peak, total = carry
            slot = slot_of(block - first, STAGES)

            def multiply_qk(acc):
                plgpu.wgmma(acc, own_q, k_smem.at[slot].transpose((1, 0)))
                take_turn()
                return acc[...]

            s = pl.run_scoped(multiply_qk, plgpu.ACC((BLOCK_Q, BLOCK_KV), jnp.float32))
            plgpu.barrier_arrive(k_used.at[slot])
            if score.softcap is None:
                scale = score.scale * LOG2E
            else:
                s, scale = jnp.tanh(s * (score.scale / score.softcap)), score.softcap * LOG2E
            s = lax.cond(
                (block < full_first) | (block >= full_stop),
                lambda s: jnp.where(interval_mask(s.shape, block * BLOCK_KV, lo, hi), s, -jnp.inf),
                lambda s: s,
                s,
            )
            # The peak is in units of log 2, so that p costs one multiply-add and one exp2.
            higher = jnp.maximum(peak, s.max(axis=1) * scale)
            decay = jnp.exp2(peak - higher)
            p = jnp.exp2(s * scale - per_row(higher, s.shape))
            summed *= per_row(decay, summed.shape)
            total = total * decay + p.sum(axis=1)
            p = p.astype(dtype)
            # All of the softmax belongs before the turn is given away.
            summed, total, higher, p = lax.optimization_barrier((summed, total, higher, p))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(turn)

            def multiply_pv(acc):
                plgpu.wgmma(acc, p, v_smem.at[slot])

                @pl.when(block + 1 < stop)
                def _():
                    plgpu.barrier_wait(k_here.at[slot_of(block + 1 - first, STAGES)])

            summed = pl.run_state(multiply_pv)(plgpu.ACC.init(summed))
            plgpu.barrier_arrive(v_used.at[slot])
            return summed, higher, total

        summed, peak, total = lax.fori_loop(first, stop, attend, (summed, peak, total))
        pl.when(warpgroup == 0)(take_turn)
        seen = total > 0
        inverse = jnp.where(seen, 1 / total, 0.0)
        own_out[...] = (summed * per_row(inverse, summed.shape)).astype(dtype)
        own_lse[...] = jnp.where(seen, (peak + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_out, out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(own_lse, lse_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def load():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, groups)

        def fetch(source, stages, here):
            def copy(block, slot):
                rows = source.at[batch, pl.ds(block * BLOCK_KV, BLOCK_KV), kv_head]
                plgpu.copy_gmem_to_smem(rows, stages.at[slot], here.at[slot])

            return copy

        stream(first, stop, STAGES, (fetch(k_ref, k_smem, k_here), k_used), (fetch(v_ref, v_smem, v_here), v_used))
