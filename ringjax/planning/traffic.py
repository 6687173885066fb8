"""What a ring sends, and from which length on nobody waits for it."""

import dataclasses

import jax.numpy as jnp

from ringjax.attention import layouts
from ringjax.planning import work

FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes that each device of a ring sends in one layer.

    `kv` is one rotation of K and V in the model's type; `sums` one rotation of dK and dV, which travel in
    float32 because they are sums over the hops.
    """

    rotations: int
    kv: int
    sums: int

    @classmethod
    def of(
        cls, layout: str | layouts.Layout, ring_size: int, seq_len: int, *, kv_heads: int, head_dim: int,
        v_dim: int | None = None, batch: int = 1, dtype="bfloat16", window: int | None = None,
    ) -> "Traffic":  # fmt: skip
        """Causal attention over `seq_len` tokens in a ring; `batch` and `kv_heads` are those of one device.

        kv   = B · C · K · (H + Hv) · bytes of dtype          C = T / R slots a device
        sums = B · C · K · (H + Hv) · 4
        """
        offsets = work.hops(layout, ring_size, seq_len, None if window is None else window - 1)
        numbers = batch * (seq_len // ring_size) * kv_heads * (head_dim + (head_dim if v_dim is None else v_dim))
        return cls(len(offsets) - 1, numbers * jnp.dtype(dtype).itemsize, numbers * FLOAT32_BYTES)

    @property
    def forward(self) -> int:
        """K and V pass on after every hop but the last."""
        return self.rotations * self.kv

    @property
    def backward(self) -> int:
        """K and V go around again; dK and dV follow one hop behind them and then go home, one rotation more."""
        return self.forward + self.returned

    @property
    def returned(self) -> int:
        """The part of the backward pass that is dK and dV."""
        return self.rotations * self.sums


def hidden_from(
    flops: float, bandwidth: float, *, heads: int, kv_heads: int, visible: float = 0.5, dtype="bfloat16"
) -> float:
    """The shortest shard, in tokens, whose forward rotation takes no longer than the compute that hides it.

        compute  4·H·N · visible·C² / flops        visible: the share of a hop's block that is not masked
        rotation 2·H·K · C · bytes / bandwidth
        C        ≥ flops / bandwidth · K / N · bytes / (2 · visible)

    `flops` operations a second of the attention kernel, `bandwidth` bytes a second that a device sends to its
    neighbour. With K = N, bfloat16 and no mask this is c ≥ F / B of Liu et al. 2023 (arXiv:2310.01889).
    """
    return flops / bandwidth * kv_heads / heads * jnp.dtype(dtype).itemsize / (2 * visible)
