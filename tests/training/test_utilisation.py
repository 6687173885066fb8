"""MFU and the table of devices."""

import dataclasses

import numpy as np
import pytest

from ringjax.attention import layouts
from ringjax.data.example import Example, see_whole_frames
from ringjax.data.packing import assemble, cut
from ringjax.models.config import ModelConfig
from ringjax.models.lora import LoraConfig
from ringjax.models.shifted import first_heads
from ringjax.models.sizes import get_size
from ringjax.training import stage as stage_loop
from ringjax.training import utilisation
from ringjax.training.feed import Feed
from ringjax.training.load import parse_config
from ringjax.training.loop import train
from ringjax.training.mesh import make_mesh
from ringjax.training.metrics import read_metrics
from ringjax.training.transformer_task import TransformerTask, step_flops
from ringjax.training.utilisation import flops_of, mfu, peak_flops, useful_flops, visible_pairs
from tests.tiny_run import CONFIG

MODEL = ModelConfig(width=32, ffn_width=8, layers=3, heads=4, kv_heads=2, head_dim=10)
LENGTH, CODES = 48, 50
STAGE = parse_config(CONFIG, overrides=[("training.seq_len", str(LENGTH))]).stage_list[0]
# Tokens of the examples of each row, and where frames of the first of them begin and end: one is cut by its end.
ROWS = (((20, 28), ((3, 9), (9, 13), (16, 21))), ((17,), ((0, 4),)), ((48,), ()), ((), ()), ((1, 2, 5), ()))


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


def rows_of(rows=ROWS, window=None):
    """`rows` as the loader packs them."""
    packed = []
    for lengths, frames in rows:
        pieces = []
        for number, length in enumerate(lengths):
            tokens, modality = np.zeros(length + 1, np.int32), np.zeros(length + 1, bool)
            for start, stop in frames if number == 0 else ():
                modality[start:stop], tokens[stop - 1] = True, CODES
            example = Example(tokens, modality, ~modality)
            pieces += cut(see_whole_frames(example, CODES), LENGTH, vision_codes=CODES)
        packed.append(pieces)
    return assemble(packed, len(packed), LENGTH, window=window)


def dense(rows=ROWS, window=LENGTH, group=None, shift=0):
    """How many tokens there are, and who sees whom, from what the masks mean: bool `[rows, T, T]`."""
    seen = np.zeros((len(rows), LENGTH, LENGTH), bool)
    for row, (lengths, frames) in enumerate(rows):
        first = 0
        for number, length in enumerate(lengths):
            for q in range(length):
                for k in range(length):
                    together = any(a <= q < b and a <= k < b for a, b in frames) and number == 0
                    grouped = group is None or (q + shift) // group == (k + shift) // group
                    seen[row, first + q, first + k] = (k <= q or together) and abs(q - k) < window and grouped
            first += length
    return seen


@pytest.mark.parametrize("layout, ring", [("contiguous", 1), ("striped", 4), ("zigzag", 4)])
@pytest.mark.parametrize("own, of_data", [(None, None), (6, None), (None, 9), (1, 9), (40, 12)])
def test_pairs_are_those_of_the_dense_mask(own, of_data, layout, ring):
    batch = {name: layouts.get(layout).permute(x, ring, axis=1) for name, x in rows_of(window=of_data).items()}
    model = dataclasses.replace(MODEL, window=own)
    seen = dense(window=min(own or LENGTH, of_data or LENGTH))
    assert visible_pairs(batch, model) == seen.sum()
    tokens = sum(sum(lengths) for lengths, _ in ROWS)
    assert flops_of(batch, model, 70, frozen=9) == (6 * 70 + 4 * 9) * tokens + 12 * 3 * 4 * 10 * seen.sum()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads, key_heads", [(4, 2), (9, 3), (4, 1), (3, 3)])
def test_pairs_of_shifted_groups_are_those_of_each_head(heads, key_heads, window):
    model = dataclasses.replace(MODEL, heads=heads, kv_heads=key_heads, shifted_group=8, window=window)
    first, _ = first_heads(heads, key_heads)
    seen = [dense(window=window or LENGTH, group=8, shift=0 if head < first else 4).sum() for head in range(heads)]
    assert visible_pairs(rows_of(), model) == pytest.approx(sum(seen) / heads, rel=1e-12)
    assert flops_of(rows_of(), model, 0) == pytest.approx(12 * 3 * 10 * sum(seen), rel=1e-12)


def test_a_full_row_counts_as_elsewhere_and_others_less():
    """One causal document: 6 · layers · width · T², up to the diagonal."""
    full, packed, padded = (
        flops_of(rows_of([(lengths, ())]), MODEL, 1000) for lengths in ((LENGTH,), (LENGTH // 2,) * 2, (LENGTH // 2,))
    )
    assert full == 6 * 1000 * LENGTH + 6 * 3 * 40 * LENGTH * (LENGTH + 1)
    assert packed == 6 * 1000 * LENGTH + 6 * 3 * 40 * LENGTH * (LENGTH // 2 + 1) == 2 * padded


def test_long_rows_do_not_overflow():
    length = 2**17
    position = np.arange(length, dtype=np.int32)[None]
    batch = {"positions": position, "behind": position, "ahead": np.zeros_like(position)}
    assert visible_pairs(batch, MODEL) == length * (length + 1) / 2


def test_padded_rows_are_slower_than_packed_ones(monkeypatch):
    """In the same time, by the share of what they hold; and rows that another process has count as one's own."""
    monkeypatch.setattr(utilisation, "_PEAKS", (("cpu", 1e9),))
    packed, padded = [((20, 28), ())] * 2, [((20,), ()), ((28,), ())]
    task = TransformerTask(STAGE)
    found = [task.speed(1000, 0.5, rows_of(rows)) for rows in (packed, padded, packed[:1])]
    for name in ("mfu", "tokens_per_second"):
        used = [speed[name] for speed in found]
        assert used[0] == pytest.approx(2 * used[1]) and used[2] == pytest.approx(used[0]) and used[1] > 0
    assert found[0]["tokens_per_second"] == 2 * 48 / 0.5 * STAGE.training.batch_size / 2


def test_adapters_leave_the_model_frozen():
    rows = rows_of(ROWS[:2])
    whole, frozen = step_flops(STAGE, None, 100, rows), STAGE.model.parameter_count()
    assert step_flops(STAGE, LoraConfig(), 100, rows) == pytest.approx(whole + 4 * frozen * (20 + 28 + 17))
    norms = (2 * STAGE.model.layers + 1) * STAGE.model.width  # counted among the 100 already
    with_norms = step_flops(STAGE, LoraConfig(also=("norms",)), 100, rows)
    assert with_norms == pytest.approx(whole + 4 * (frozen - norms) * (20 + 28 + 17))


def test_a_run_logs_the_mfu_of_each_steps_own_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(utilisation, "_PEAKS", (("cpu", 1e9),))
    monkeypatch.setattr(stage_loop, "is_simulated", lambda: False)  # metrics are read one step late, as on real devices
    run = parse_config(CONFIG, overrides=[("run_dir", str(tmp_path)), ("training.steps", "3"), ("data.packing", "pad")])
    logged = [record for record in read_metrics(train(run) / "metrics.jsonl") if "loss" in record]
    stage = run.stage_list[0]
    with Feed(stage, make_mesh(stage.mesh.shape), run.seed) as feed:
        flops = [step_flops(stage, None, stage.model.parameter_count(), feed.next().rows) for _ in logged]
    assert len(set(flops)) == 3 and "mfu" not in logged[0]  # the first step has no time
    found = [record["mfu"] * record["seconds"] * 8e9 for record in logged[1:]]
    assert found == pytest.approx(flops[1:])


def test_the_formula_agrees_with_a_published_step():
    """LLaMA 1.24B at 32K on one H100, 20.6k tokens/s: 33.1 % MFU."""
    flops = useful_flops(get_size("1b"), 1_244_000_000, 32768, 32768**2 / 2)
    assert mfu(flops, 32768 / 20600, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(0.331, abs=0.04)
    assert mfu(flops, 1.0, "NVIDIA H100", 2) == mfu(flops, 2.0, "NVIDIA H100", 1)
