"""Other projects' attention in JAX, on the same inputs and devices. Imported only where somebody asks for them.

    ringattention   haoliuhl/ringattention (PyPI): XLA scans over chunks, contiguous shards, K/V heads repeated
    tokamax         openxla/tokamax (PyPI): Mosaic GPU kernels on one device

Each is given its best: several settings are tried, the fastest is timed. Their errors are shown and judged only as far
as nonsense goes: their authors never promised our bounds.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import repeat
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ringjax.benchmarks.programs import SEQUENCE
from ringjax.benchmarks.workload import Workload

# A relative error beyond this is another function, not another rounding.
NONSENSE = 0.05
CHUNKS = (512, 1024, 2048)


class Absent(ImportError):
    """The peer isn't installed, or cannot be imported with this JAX."""


class Candidate(NamedTuple):
    """`attend(q, k, v, reach)` on ascending arrays, over the ring or on one device."""

    label: str
    attend: Callable[..., Array]


def candidates(peer: str, work: Workload, mesh) -> Iterator[Candidate]:
    """The settings of a peer to try. Raises Absent, and NotImplementedError for what it hasn't got."""
    return {"ringattention": _ringattention, "tokamax": _tokamax}[peer](work, mesh)


def on_one_device(peer: str) -> bool:
    """Whether it knows nothing of a mesh."""
    return peer == "tokamax"


# ------------------------------------------------------------------ haoliuhl/ringattention


def _ringattention(work: Workload, mesh) -> Iterator[Candidate]:
    ring_attention = _load_ringattention()
    if work.window is not None:
        raise NotImplementedError("ringattention has no sliding window")
    if work.length % mesh.size:
        raise NotImplementedError(f"ringattention cannot cut {work.length} tokens into {mesh.size} shards")
    length = work.length // mesh.size
    chunks = [chunk for chunk in CHUNKS if length % chunk == 0] or [length]
    for chunk in chunks:
        for float32_logits in (True, False):
            settings = dict(
                causal_block_size=None if work.mask == "full" else 1, query_chunk_size=chunk, key_chunk_size=chunk,
                deterministic=True, dropout_rng=None, attn_pdrop=0.0, precision=None, prevent_cse=False,
                dtype=jnp.float32 if float32_logits else jnp.dtype(work.dtype),
                policy=jax.checkpoint_policies.nothing_saveable,
            )  # fmt: skip
            label = f"chunk {chunk}" + (", float32 logits" if float32_logits else "")
            attend = functools.partial(_over_ring, ring_attention, work, mesh, float32_logits, settings)
            yield Candidate(label, attend)


def _over_ring(ring_attention, work: Workload, mesh, float32_logits: bool, settings: dict, q, k, v, reach) -> Array:
    segments = None
    if reach is not None:  # whole on every device: that is how it takes them
        segments = jnp.cumsum(reach.behind == 0, axis=1, dtype=jnp.int32)
    k, v = (repeat(x, "b s k h -> b s (k g) h", g=work.heads // work.kv_heads) for x in (k, v))

    def local(q, k, v, segments):
        return ring_attention(q, k, v, None, segments, None, "sp", float32_logits, settings).astype(q.dtype)

    specs = (SEQUENCE, SEQUENCE, SEQUENCE, P())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=SEQUENCE, check_vma=False)(q, k, v, segments)


def _load_ringattention():
    """Its XLA implementation. The package itself cannot be imported: it asks for `jax.lib.xla_bridge`, which is gone
    (ringattention 0.1.2, the last, of 2024)."""
    spec = importlib.util.find_spec("ringattention")
    if spec is None or not spec.submodule_search_locations:
        raise Absent("pip install ringattention")
    path = f"{list(spec.submodule_search_locations)[0]}/ringattention_jax.py"
    try:
        spec = importlib.util.spec_from_file_location("ringattention_jax", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.ring_attention
    except (ImportError, AttributeError, OSError) as error:
        raise Absent(f"ringattention cannot be imported: {error}") from error


# ------------------------------------------------------------------ openxla/tokamax


def _tokamax(work: Workload, mesh) -> Iterator[Candidate]:
    del mesh
    if importlib.util.find_spec("tokamax") is None:
        raise Absent("pip install tokamax (Python 3.12 or newer)")
    try:
        from tokamax._src.ops.attention.base import Mask
        from tokamax.ops import gpu
    except Exception as error:  # it imports much that has nothing to do with attention
        raise Absent(f"tokamax cannot be imported: {type(error).__name__}: {error}") from error
    if jax.devices()[0].platform != "gpu":
        raise NotImplementedError("tokamax's Mosaic GPU attention needs an NVIDIA GPU")
    # The second is the fastest forward pass found on an H100 (64/128 blocks, 658-668 TFLOP/s at 32K).
    best = gpu.PallasMosaicFlashAttentionConfig
    settings = {"its own choice": {}}
    for stages in (2, 3):
        make = functools.partial(_tokamax_config, best, stages)
        if (config := make()) is not None:
            settings[f"64/128, {stages} stages"] = dict(config=config)
    for label, options in settings.items():
        op = gpu.PallasMosaicFlashAttention(**options)
        yield Candidate(label, functools.partial(_one_device, op, Mask, work))


def _tokamax_config(kind, stages: int):
    """Its config for Hopper, where it is one class (older versions) or one of several."""
    for one in getattr(kind, "__args__", None) or getattr(getattr(kind, "__value__", None), "__args__", (kind,)):
        try:
            return one(block_q=64, block_kv=128, num_stages=stages, persistent=False)
        except (TypeError, ValueError):
            continue
    return None


def _one_device(op, mask_type, work: Workload, q, k, v, reach) -> Array:
    start = None
    if work.mask == "packed" or work.window is not None:
        start = jnp.asarray(work.interval[0][:, None], jnp.int32)
    mask = None if work.mask == "full" else mask_type(is_causal=True, k_start=start)
    return op(q, k, v, mask=mask)
