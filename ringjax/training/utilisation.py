"""Model FLOP/s utilisation (MFU): useful FLOP/s of a training step over the peak of the devices.

    FLOPs of a batch = (6 · parameters + 4 · frozen) · tokens + 12 · layers · (N·H) · pairs

6 a parameter and token: 2 forward, 4 backward, of which frozen parameters need 2. Attention: 4·N·H a (query, key) pair
forward for the two products, backward twice that. Tokens are the slots that hold an example, and pairs those that the
masks show: of a row of T tokens

    one causal document     T·(T + 1)/2, so 6 · layers · (N·H) · T² as others count
    packed documents        Σ n·(n + 1)/2 over their tokens n
    padding                 none, and it is no token

Recomputation is not counted. Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from ringjax.models.config import ModelConfig
from ringjax.models.shifted import first_heads

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


def useful_flops(model: ModelConfig, parameters: int, tokens: float, pairs: float, *, frozen: int = 0) -> float:
    """FLOPs of forward and backward for so many tokens and (query, key) pairs a head; `frozen` parameters have no
    gradients of their own."""
    width = model.heads * model.head_size
    return (6.0 * parameters + 4.0 * frozen) * tokens + 12.0 * model.layers * width * pairs


def flops_of(batch: Mapping[str, np.ndarray], model: ModelConfig, parameters: int, *, frozen: int = 0) -> float:
    """Useful FLOPs of forward and backward for rows that `ringjax.data.packing` made, in any layout."""
    return useful_flops(model, parameters, tokens_of(batch), visible_pairs(batch, model), frozen=frozen)


def tokens_of(batch: Mapping[str, np.ndarray]) -> int:
    """Slots of these rows that hold a token; the rest is padding."""
    return int(np.count_nonzero(batch["behind"] >= 0))


def visible_pairs(batch: Mapping[str, np.ndarray], model: ModelConfig) -> float:
    """The (query, key) pairs that a head of `model` sees in these rows, the mean over its heads where groups differ.

    Counted from what each query sees behind and ahead: no mask is made, and the order of the slots plays no part.
    """
    behind, ahead, group = batch["behind"], batch["ahead"], model.shifted_group
    if model.window is not None:
        behind, ahead = np.minimum(behind, model.window - 1), np.minimum(ahead, model.window - 1)
    if group is None:
        return float(_pairs(behind, ahead))
    first, _ = first_heads(model.heads, model.key_heads)
    counted = 0
    for heads, shift in ((first, 0), (model.heads - first, group // 2)):
        # As `models.shifted.group_reach`, in numpy; no reach goes beyond its document, so short first groups are cut.
        place = (batch["positions"] + shift) % group
        counted += heads * _pairs(np.minimum(behind, place), np.minimum(ahead, group - 1 - place))
    return counted / model.heads


def _pairs(behind: Int[np.ndarray, "B T"], ahead: Int[np.ndarray, "B T"]) -> int:
    """Σ behind + 1 + ahead over the queries; padding (−1, 0) adds nothing."""
    return int(np.sum(behind + ahead + 1, dtype=np.int64))


def mfu(flops: float, seconds: float, device_kind: str, device_count: int) -> float | None:
    """Share of the peak that `flops` in `seconds` on `device_count` devices are, None when the peak isn't known."""
    peak = peak_flops(device_kind)
    return None if peak is None or seconds <= 0 else flops / seconds / (peak * device_count)
