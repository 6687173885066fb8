"""How much each device of a ring has to do in each hop: counted from the layouts, without running anything.

The unit is a visible (query, key) pair. Attention costs 4·H·N operations a pair forward (2·H for the score,
2·H for the sum, in each of N heads), so pairs are proportional to time on a kernel that skips what is masked.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ringjax.attention import layouts
from ringjax.attention.reach import Reach
from ringjax.attention.ring import Ring


def pairs(
    layout: str | layouts.Layout, ring_size: int, seq_len: int, reach: Reach | None = None
) -> Int[np.ndarray, "R R"]:
    """`pairs[d, h]`: the (query, key) pairs of device d in hop h, when shard d − h (mod R) visits it.

        pairs[d, h] = Σ_t max(0, slots_below(stop_t, d − h) − slots_below(start_t, d − h))

    over the queries t of shard d, where t sees the global interval `start_t … stop_t − 1`. `reach` is
    `[B, T]` in ascending global order (None: causal, one row); rows are summed. Memory is linear in T.

    Raises ValueError when the layout cannot cut `seq_len`, or the reach has another length.
    """
    order = layouts.get(layout)
    order.validate(seq_len, ring_size)
    reach = Reach.causal(1, seq_len) if reach is None else reach
    reach.validate(reach.behind.shape[0], seq_len)
    length = seq_len // ring_size
    start, stop = reach.interval(jnp.arange(seq_len, dtype=jnp.int32))
    return np.stack([_of_device(order, device, ring_size, length, start, stop) for device in range(ring_size)])


def _of_device(order: layouts.Layout, device: int, ring_size: int, length: int, start, stop):
    """The pairs of one device, hop by hop."""
    slots = order.slots(device, ring_size, length)
    visiting = (device - jnp.arange(ring_size)[:, None, None]) % ring_size
    lo, hi = (order.slots_below(x[:, slots], visiting, ring_size, length) for x in (start, stop))
    return np.asarray(jnp.maximum(hi - lo, 0)).sum((1, 2), dtype=np.int64)


def slowest(pairs: Int[np.ndarray, "R R"]) -> int:
    """The pairs that a ring waits for: a hop lasts as long as its busiest device.

        slowest = Σ_h max_d pairs[d, h]
    """
    return int(pairs.max(axis=0).sum())


def busy(pairs: Int[np.ndarray, "R R"]) -> float:
    """The share of the machine's time that is work: all pairs over R times those that the ring waits for."""
    waited = len(pairs) * slowest(pairs)
    return float(pairs.sum() / waited) if waited else 1.0


def causal_speed_up(ring_size: int, seq_len: int) -> float:
    """How much faster striped is than contiguous under a causal mask, at most; C = T / R slots a shard.

        contiguous waits for  C(C+1)/2 + (R−1)·C²      (from hop 1 on, some device has a full block)
        striped waits for     R · C(C+1)/2             (in every hop all have half a block)
        speed-up              ((2R−1)·C + 1) / (R·(C+1))  →  2 − 1/R

    Communication is not counted, nor what tiles at the edge of the mask cost. Brandon et al. 2023
    (arXiv:2311.09431) measured 1.45 on 8 GPUs and 1.65 on 16 TPU chips.
    """
    layouts.get("striped").validate(seq_len, ring_size)
    length = seq_len // ring_size
    return ((2 * ring_size - 1) * length + 1) / (ring_size * (length + 1))


def hops(
    layout: str | layouts.Layout,
    ring_size: int,
    seq_len: int,
    max_behind: int | None = None,
    max_ahead: int | None = 0,
) -> tuple[int, ...]:
    """The hops h that a ring makes when no query sees further than `max_behind` back and `max_ahead` on.

    None means no bound. Hop h is the visit of shard d − h to device d; there is one rotation between two hops.
    """
    order = layouts.get(layout)
    order.validate(seq_len, ring_size)
    bounds = dict(max_behind=max_behind, max_ahead=max_ahead)
    return Ring.of(order, None, ring_size, length=seq_len // ring_size, **bounds).offsets
