"""A few queries over a long cache on Hopper (Flash-Decoding, Dao, Haziza, Massa and Sizov 2023).

The keys are split among the multiprocessors, one block of threads for each (key/value head, split). A block's tile of
64 rows holds all queries of its head, so a key is read once for all of them; the partial results are merged by the one
rule of `ringjax.attention.merge`. The time is that of reading the cache: one warpgroup computes while another loads.

The caches of all layers are one array, of which the kernel reads layer `layer` where it lies: a slice would be a copy.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int

from ringjax.attention.kernels.base import Score
from ringjax.attention.kernels.mosaic import FEW_ROWS
from ringjax.attention.kernels.mosaic.parts import (
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
from ringjax.attention.merge import Partial, merge_along

ROWS = FEW_ROWS  # of a tile: what one warpgroup multiplies
BLOCK_KV = 128
STAGES = 2
LOWEST = -1e30
MULTIPROCESSORS = 132  # of an H100 or H200


@functools.partial(compiled_once, static=("score", "splits"))
def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "layers B S K H"],
    v: Float[Array, "layers B S K Hv"],
    layer: Int[Array, ""],
    lo: Int[Array, "B T"],
    hi: Int[Array, "B T"],
    score: Score,
    *,
    splits: int | None = None,
) -> Partial:
    """As `reference.forward` over one layer of the caches, in float32; T · N / K is at most `ROWS`.

    `splits` (None: as many as keep all multiprocessors busy) are the parts of the keys, each read by one of them.
    """
    batch, length, heads, head_dim = q.shape
    keys, kv_heads, v_dim = k.shape[2], k.shape[3], v.shape[-1]
    groups = heads // kv_heads
    used = -(-length * groups // 8) * 8
    splits = splits or max(1, MULTIPROCESSORS // (batch * kv_heads))
    rows = rearrange(q, "b t (k g) h -> b k (t g) h", k=kv_heads)
    lo, hi = (jnp.repeat(jnp.clip(x, 0, keys), groups, axis=1) for x in (lo, hi))
    blocks = _split(lo, hi, keys, splits)
    missing = ROWS - length * groups
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0)))
    lo, hi = (jnp.pad(x, ((0, 0), (0, missing))) for x in (lo, hi))
    whole = lambda x: rearrange(x, "layers b s k h -> (layers b) s k h")  # noqa: E731
    body = functools.partial(_kernel, score=score, batch_size=batch, used=used, dtype=q.dtype)
    out, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, splits, used, v_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, splits, ROWS), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=swizzled((ROWS, head_dim), q.dtype),
            out_smem=swizzled((ROWS, v_dim), q.dtype),
            lse_smem=plgpu.SMEM((ROWS,), jnp.float32),
            k_smem=swizzled((STAGES, BLOCK_KV, head_dim), k.dtype),
            v_smem=swizzled((STAGES, BLOCK_KV, v_dim), v.dtype),
            q_here=plgpu.Barrier(),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_used=plgpu.Barrier(num_barriers=STAGES),
            v_used=plgpu.Barrier(num_barriers=STAGES),
        ),
        grid=(kv_heads, splits, batch),
        grid_names=("heads", "splits", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        kernel_name="ringjax_split",
    )(rows, whole(k), whole(v), lo, hi, blocks, jnp.reshape(layer, (1,)).astype(jnp.int32))
    tokens = lambda x: rearrange(x[:, :, : length * groups], "b k (t g) ... -> b k t g ...", g=groups)  # noqa: E731
    merged = merge_along(rearrange(out, "b k s r h -> b k r s h"), rearrange(lse[..., :used], "b k s r -> b k r s"))
    return Partial(
        rearrange(tokens(merged.out), "b k t g h -> b t (k g) h"),
        rearrange(tokens(merged.lse), "b k t g -> b (k g) t"),
    )


def _split(lo, hi, keys: int, splits: int) -> Int[Array, "B splits 4"]:
    """`tiles.Blocks` of each split: the blocks that any of the queries sees, shared out evenly."""
    blind = lo >= hi
    lo_, hi_ = jnp.where(blind, keys, lo), jnp.where(blind, 0, hi)
    first = lo_.min(1) // BLOCK_KV
    stop = jnp.maximum(-(-hi_.max(1) // BLOCK_KV), first)
    full_first = -(-jnp.where(blind, 0, lo).max(1) // BLOCK_KV)
    full_stop = jnp.where(blind, keys, hi).min(1) // BLOCK_KV
    share = -(-(stop - first) // splits)
    begin = jnp.minimum(first[:, None] + share[:, None] * jnp.arange(splits), stop[:, None])
    end = jnp.minimum(begin + share[:, None], stop[:, None])
    full_first = jnp.clip(full_first[:, None], begin, end)
    full_stop = jnp.clip(full_stop[:, None], full_first, end)
    return jnp.stack([begin, full_first, full_stop, end], axis=-1).astype(jnp.int32)


def _kernel(
    q_ref, k_ref, v_ref, lo_ref, hi_ref, blocks_ref, layer_ref, out_ref, lse_ref,
    *, q_smem, out_smem, lse_smem, k_smem, v_smem, q_here, k_here, v_here, k_used, v_used,
    score: Score, batch_size: int, used: int, dtype,
):  # fmt: skip
    batch, head, split = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("splits")
    warpgroup = lax.axis_index("warpgroup")
    first, full_first, full_stop, stop = bounds(blocks_ref, batch, split)

    @pl.when(warpgroup == 0)
    def compute():
        plgpu.copy_gmem_to_smem(q_ref.at[batch, head], q_smem, q_here)
        lo, hi = (plgpu.load(ref.at[batch], layout=ROW, optimized=False) for ref in (lo_ref, hi_ref))
        plgpu.barrier_wait(q_here)
        peak = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), ROW)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        summed = plgpu.layout_cast(jnp.zeros(out_smem.shape, jnp.float32), WGMMA)

        def attend(block, carry):
            summed, peak, total = carry
            slot = slot_of(block - first, STAGES)
            plgpu.barrier_wait(k_here.at[slot])

            def multiply_qk(acc):
                plgpu.wgmma(acc, q_smem, k_smem.at[slot].transpose((1, 0)))
                return acc[...]

            s = pl.run_scoped(multiply_qk, plgpu.ACC((ROWS, BLOCK_KV), jnp.float32))
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
            higher = jnp.maximum(peak, s.max(axis=1) * scale)
            decay = jnp.exp2(peak - higher)
            p = jnp.exp2(s * scale - per_row(higher, s.shape))
            summed *= per_row(decay, summed.shape)
            total = total * decay + p.sum(axis=1)
            plgpu.barrier_wait(v_here.at[slot])
            summed = pl.run_state(lambda acc: plgpu.wgmma(acc, p.astype(dtype), v_smem.at[slot]))(
                plgpu.ACC.init(summed)
            )
            plgpu.barrier_arrive(v_used.at[slot])
            return summed, higher, total

        summed, peak, total = lax.fori_loop(first, stop, attend, (summed, peak, total))
        seen = total > 0
        out_smem[...] = (summed * per_row(jnp.where(seen, 1 / total, 0.0), summed.shape)).astype(dtype)
        lse_smem[...] = jnp.where(seen, (peak + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, used)], out_ref.at[batch, head, split])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, split])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def load():
        row = layer_ref[0] * batch_size + batch

        def fetch(source, stages, here):
            def copy(block, slot):
                keys = source.at[row, pl.ds(block * BLOCK_KV, BLOCK_KV), head]
                plgpu.copy_gmem_to_smem(keys, stages.at[slot], here.at[slot])

            return copy

        stream(first, stop, STAGES, (fetch(k_ref, k_smem, k_here), k_used), (fetch(v_ref, v_smem, v_here), v_used))
