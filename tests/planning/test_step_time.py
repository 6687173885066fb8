"""Predicted steps are within 15 % of those measured: the rows of docs/results/training.md themselves."""

import dataclasses
import re
from pathlib import Path

import pytest

from ringjax.planning import communication, step_time
from ringjax.planning.devices import Target
from ringjax.planning.plan import plan_stage
from ringjax.training.load import load_config, parse_config

ROOT = Path(__file__).parents[2]
CONFIGS = {"LWM `1b`, 1.244B": "long_1b", "SmolLM2-135M": "long_135m"}


def rows():
    """Every timed step as (config, tokens, rows, remat, GPUs, seconds); the very first step of 512K is no step time."""
    model, gpus = None, 1
    for line in (ROOT / "docs/results/training.md").read_text().splitlines():
        gpus = 2 if line.startswith("## Two GPUs") else gpus
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or "the first step" in line:
            continue
        if gpus == 1:
            model = CONFIGS.get(cells[0], model) if cells[0] else model
            cells = cells[1:]
        else:
            model = "long_1b"
        time = re.match(r"([\d.]+) (ms|s)\b", cells[2]) if len(cells) > 3 else None
        if time and model:
            batch, tokens = (int(n) for n in ("1 × " + cells[0]).split(" × ")[-2:])
            yield model, tokens, batch, cells[1].split(",")[0], gpus, float(time[1]) / (1e3 if time[2] == "ms" else 1)


ROWS = list(rows())


def test_the_table_is_read_whole():
    assert len(ROWS) == 12 and {row[4] for row in ROWS} == {1, 2} and {row[0] for row in ROWS} == set(CONFIGS.values())


@pytest.mark.parametrize("model, tokens, batch, remat, gpus, seconds", ROWS)
def test_predicted_steps_are_those_measured(model, tokens, batch, remat, gpus, seconds):
    run = load_config(ROOT / f"configs/{model}.yaml")
    stage = next(stage for stage in run.stages if stage.training.seq_len == tokens)
    assert stage.training.batch_size == batch
    if remat != stage.model.remat:  # the rows that keep less than the config
        stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, remat=remat, unroll=1))
    plan = plan_stage(run, stage, Target.parse(f"h100:{gpus}"))
    assert plan.fits and plan.time.seconds == pytest.approx(seconds, rel=0.15)


def plan_of(target: str, **mesh):
    text = "{model: {size: 7b, vision_vocab_size: 0, remat: full}, data: {}, training: {seq_len: %d, batch_size: 1}}"
    run = parse_config(text % 2**20, overrides=[(f"mesh.{key}", value) for key, value in mesh.items()])
    return plan_stage(run, run.stage_list[0], Target.parse(target))


def test_contiguous_shards_wait_for_half_of_their_attention():
    striped, contiguous = (
        plan_of("h100:64", shape="1,1,1,-1", layout=layout).time for layout in ("striped", "contiguous")
    )
    assert striped.waiting == 0
    assert contiguous.waiting == pytest.approx((1 - 1 / 64) * contiguous.attention, rel=1e-3)


def test_a_rotation_is_exposed_where_a_device_has_too_few_tokens():
    """The overlap condition: C ≥ FLOP/s ÷ bandwidth; beside it the hop is longer than what hides it."""
    many = plan_of("tpu:v4:8x8x16", shape="1,1,1,-1")
    few = plan_of("tpu:v4:8x8x16", shape="1,1,1,-1", strategy="ring").hop
    assert few.tokens == 1024 and few.needed_tokens == pytest.approx(0.5 * 275e12 / (0.8 * 50e9) * 2, rel=1e-6)
    assert not few.hidden and many.time.exposed > many.time.hidden
    long = plan_of("tpu:v4:2x2x2", shape="1,1,1,-1")
    assert long.hop.hidden and long.time.hidden > 0


def test_what_is_sent_by_each_strategy():
    """all_gather sends as much as a ring and hides nothing; ulysses sends less."""
    times = {
        name: plan_of("h100:8", shape="1,1,1,-1", strategy=name).time for name in ("ring", "all_gather", "ulysses")
    }
    assert times["ring"].exposed < times["ulysses"].exposed < times["all_gather"].exposed


def test_a_window_leaves_fewer_rotations():
    run = parse_config(
        "{model: {size: 1b, window: 4096}, data: {}, training: {seq_len: 131072, batch_size: 1},"
        " mesh: {shape: '1,1,1,-1', layout: contiguous}}"
    )
    plan = plan_stage(run, run.stage_list[0], Target.parse("h100:8"))
    whole = dataclasses.replace(plan.stage, model=dataclasses.replace(plan.stage.model, window=None))
    assert plan.time.attention < 0.1 * step_time.of_stage(whole, plan.sizes, plan.target, plan.parameters).attention
    sent = communication.of_stage(plan.stage, plan.sizes, plan.target, 1.0)
    assert sent.exposed + sent.hidden < 0.5 * sum(
        dataclasses.astuple(communication.of_stage(whole, plan.sizes, plan.target, 1.0))
    )
