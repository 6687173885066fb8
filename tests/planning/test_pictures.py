"""The figures say what the layouts say, and their files are small and reproducible."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ringjax as rj
from ringjax.planning import flops, pictures, plan_pictures, work
from ringjax.planning.devices import Target
from ringjax.planning.plan import plan_stage
from ringjax.planning.traffic import Traffic
from ringjax.training.load import load_config

ROOT = Path(__file__).parents[2]


def words(place) -> list[str]:
    return [text.get_text() for text in place.texts if text.get_text()]


def numbers(place) -> list[int]:
    return [int(word) for word in words(place) if word.isdigit()]


def test_layouts_shows_the_sequence_and_then_each_shard():
    figure = pictures.draw_layouts(seq_len=16, ring_size=4)
    assert len(figure.axes) == 3
    for place, order in zip(figure.axes, rj.layouts.LAYOUTS.values()):
        assert words(place)[0] == order.name
        assert numbers(place) == [*range(16), *order.permute(np.arange(16)[None], 4, 1)[0]]


@pytest.mark.parametrize("ring_size", [2, 4, 8])
def test_ring_shows_who_visits_whom(ring_size):
    figure = pictures.draw_ring(ring_size)
    assert len(figure.axes) == ring_size
    for hop, place in enumerate(figure.axes):
        visitors = [word for word in words(place) if word[0] in "QK"]
        expected = [(f"Q{d}", f"K{(d - hop) % ring_size}\nV{(d - hop) % ring_size}") for d in range(ring_size)]
        assert visitors == [word for pair in expected for word in pair]


@pytest.mark.parametrize("reach", [None, rj.Reach.causal(2, 64, window=9)], ids=["causal", "window"])
def test_work_shows_the_counted_pairs(reach):
    figure = pictures.draw_work(ring_size=8, seq_len=64, reach=reach)
    maps = [place.images[0].get_array() for place in figure.axes if place.images]
    block = (1 if reach is None else 2) * 8**2
    for drawn, name in zip(maps, rj.layouts.LAYOUTS, strict=True):
        np.testing.assert_array_equal(drawn, work.pairs(name, 8, 64, reach) / block)


def test_traffic_bars_add_up():
    traffic = Traffic.of("striped", 8, 4096, kv_heads=8, head_dim=128)
    (place,) = pictures.draw_traffic({"one": traffic}).axes
    drawn = sum(bar.get_width() for bar in place.patches)
    assert drawn == pytest.approx((traffic.forward + traffic.backward) / 2**20)


def test_flops_bars_are_the_ratios():
    (place,) = plan_pictures.draw_flops_ratio().axes
    drawn = [bar.get_height() for bar in place.patches]
    assert drawn == [flops.ratio(shape, context) for shape in flops.FAMILY for context in flops.CONTEXTS]


def test_bars_of_a_plan_add_up_to_it():
    run = load_config(ROOT / "configs/lwm_text.yaml")
    plans = [plan_stage(run, stage, Target.parse("tpu:v4:8x8x8")) for stage in run.stages]
    (memory,), (time,) = plan_pictures.draw_memory(plans).axes, plan_pictures.draw_time(plans).axes
    for row, plan in enumerate(plans):
        bars = [[bar for bar in place.patches if bar.get_y() < row < bar.get_y() + 0.62] for place in (memory, time)]
        assert sum(bar.get_width() for bar in bars[0]) == pytest.approx(plan.memory.total / 2**30)
        assert sum(bar.get_width() for bar in bars[1]) == pytest.approx(100)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    first, second = (pictures.save(pictures.draw_ring(), tmp_path / f"{i}.png").read_bytes() for i in range(2))
    assert first == second


def test_pictures_of_the_readme(tmp_path):
    """The script draws all that are shipped; those shipped are small and have the size of a fresh drawing."""
    spec = importlib.util.spec_from_file_location("draw_readme", ROOT / "scripts" / "draw_readme.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for drawn in script.draw(tmp_path):
        shipped = script.FOLDER / drawn.name
        assert shipped.stat().st_size <= 150 * 1024
        with Image.open(shipped) as ours, Image.open(drawn) as fresh:
            assert ours.size == fresh.size
