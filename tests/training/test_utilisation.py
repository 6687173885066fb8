"""MFU and the table of devices."""

import pytest

from ringjax.training.utilisation import flops_per_row, mfu, peak_flops


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
    ],
)  # fmt: skip
def test_peaks(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_unknown_devices_have_no_mfu():
    assert peak_flops("cpu") is None
    assert mfu(1e12, 1.0, "cpu", 1) is None


def test_the_formula_agrees_with_a_published_step():
    """LLaMA 1.24B at 32K on one H100, 20.6k tokens/s: 33.1 % MFU."""
    flops = flops_per_row(parameters=1_244_000_000, layers=22, width=2048, seq_len=32768)
    assert mfu(flops, 32768 / 20600, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(0.331, abs=0.04)
    assert mfu(flops, 1.0, "NVIDIA H100", 2) == mfu(flops, 2.0, "NVIDIA H100", 1)


def test_frozen_parameters_and_groups_are_less_work():
    row = dict(layers=2, width=8, seq_len=64)
    assert flops_per_row(100, **row) == 6 * 100 * 64 + 6 * 2 * 8 * 64**2
    assert flops_per_row(10, **row, frozen=90) == (6 * 10 + 4 * 90) * 64 + 6 * 2 * 8 * 64**2
    assert flops_per_row(100, **row, group=16) == 6 * 100 * 64 + 6 * 2 * 8 * 64 * 16
    assert flops_per_row(100, **row, group=128) == flops_per_row(100, **row)
