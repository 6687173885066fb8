"""Exact ring attention for sequences longer than one device's memory, and a model that trains with it."""

from ringjax.attention import (
    Partial,
    Reach,
    attention,
    decode_attention,
    layouts,
    merge,
    ring_attention,
    sharded_attention,
)

__all__ = [
    "Partial",
    "Reach",
    "attention",
    "decode_attention",
    "layouts",
    "merge",
    "ring_attention",
    "sharded_attention",
]
__version__ = "0.1.0"
