"""Model FLOP/s utilisation (MFU): useful FLOP/s of a training step over the peak of the devices.

    FLOPs of a row = 6 · parameters · T + 6 · layers · (N·H) · T²

6 a parameter and token: 2 forward, 4 backward. Attention: 4·N·H·T² forward for the two products, half of it under a
causal mask, backward twice the forward: 6·N·H·T² a layer. Recomputation is not counted, nor is packing: a packed row
counts as a full causal one, as it does elsewhere, so that numbers can be compared.
Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

import re

# Dense bfloat16 FLOP/s of one device of JAX, from the makers' data sheets.
_PEAKS = (
    (r"tpu ?v?7x?", 1153.5e12),  # half a chip
    (r"tpu v6 ?lite|tpu v6e", 918e12),
    (r"tpu v5p|tpu v5$", 459e12),
    (r"tpu v5 ?lite|tpu v5e", 197e12),
    (r"tpu v4", 275e12),
    (r"b200", 2250e12),
    (r"h200|h100", 989e12),
    (r"a100", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device of this kind, None when it isn't known.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    """
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_kind.lower()):
            # The PCIe H100 has fewer cores and lower clocks than the SXM one.
            return 756e12 if "h100 pcie" in device_kind.lower() else peak
    return None


# Bytes a second that one device of JAX reads from its memory, from the makers' data sheets.
_BANDWIDTHS = (
    (r"tpu ?v?7x?", 3690e9),
    (r"tpu v6 ?lite|tpu v6e", 1640e9),
    (r"tpu v5p|tpu v5$", 2765e9),
    (r"tpu v5 ?lite|tpu v5e", 819e9),
    (r"tpu v4", 1228e9),
    (r"b200", 8000e9),
    (r"h200", 4800e9),
    (r"h100 pcie", 2000e9),
    (r"h100", 3350e9),
    (r"a100", 2039e9),
)


def peak_bandwidth(device_kind: str) -> float | None:
    """Peak bytes a second of the memory of a device of this kind, None when it isn't known."""
    return next((peak for pattern, peak in _BANDWIDTHS if re.search(pattern, device_kind.lower())), None)


def flops_per_row(
    parameters: int, layers: int, width: int, seq_len: int, *, frozen: int = 0, group: int | None = None
) -> float:
    """Useful FLOPs of forward and backward for one row of `seq_len` tokens; `width` is heads · head size.

    `frozen` parameters have no gradients of their own: 4 a token, not 6. With `group`, attention is within so many
    tokens (S²-Attn).
    """
    seen = seq_len if group is None else min(group, seq_len)
    return (6.0 * parameters + 4.0 * frozen) * seq_len + 6.0 * layers * width * float(seq_len) * seen


def mfu(flops: float, seconds: float, device_kind: str, device_count: int) -> float | None:
    """Share of the peak that `flops` in `seconds` on `device_count` devices are, None when the peak isn't known."""
    peak = peak_flops(device_kind)
    return None if peak is None or seconds <= 0 else flops / seconds / (peak * device_count)
