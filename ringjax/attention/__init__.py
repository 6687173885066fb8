"""Exact attention, on one device and around a ring of devices.

    merge       partial results and the rule that combines them
    reach       masks as intervals
    layouts     which global index sits in which slot of which shard
    kernels/    attention on one device, one file a backend
    ring        K and V travel around the devices
    strategies  all-gather, Ulysses, and Ulysses inside a ring
    vjp         the one gradient rule around all of them
    api         the functions that users call
    decode      a few new tokens over a long cache
"""

from ringjax.attention import layouts
from ringjax.attention.api import attention, ring_attention, sharded_attention
from ringjax.attention.decode import decode_attention
from ringjax.attention.merge import Partial, empty, merge
from ringjax.attention.reach import Reach

__all__ = [
    "Partial",
    "Reach",
    "attention",
    "decode_attention",
    "empty",
    "layouts",
    "merge",
    "ring_attention",
    "sharded_attention",
]
