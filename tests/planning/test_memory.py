"""Memory by arithmetic is the compiler's: what is stored to the byte, the fullest moment within a tenth."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from ringjax.planning import ahead, memory
from ringjax.planning.devices import Target
from ringjax.training.load import parse_config
from ringjax.training.mesh import resolve_shape

COMPILED = [json.loads(line) for line in Path(__file__).with_name("compiled_steps.jsonl").read_text().splitlines()]
SMALL = """
{model: {size: debug, vocab_size: 512, vision_codes: 64, vision_vocab_size: 68}, data: {},
 training: {seq_len: 256, batch_size: 8, accumulation: 2}, mesh: {shape: "%s"}}
"""


@pytest.mark.parametrize("shape", ["1,1,1,8", "2,2,2,1", "1,2,2,2"])
def test_what_is_stored_is_what_the_step_takes(shape):
    """On simulated devices the compiled step's arguments are parameters, moments and batch, and two counters."""
    (stage,) = parse_config(SMALL % shape).stage_list
    found = memory.of_stage(stage, resolve_shape(shape, 8), "tpu")
    step = ahead.training_program(stage, jax.devices()).compile()
    stored = found.parameters + found.optimizer + found.batch
    assert step.memory_analysis().argument_size_in_bytes == pytest.approx(stored + 8, abs=8)


@pytest.mark.parametrize("step", COMPILED, ids=[step["name"] for step in COMPILED])
def test_the_fullest_moment_is_within_a_tenth_of_the_compiler_s(step):
    """Steps that libtpu compiled for slices (docs/results/planning.md has the table and the commands)."""
    stage, target = _stage(step), Target.parse(step["target"])
    found = memory.of_stage(stage, resolve_shape(stage.mesh.shape, target.count), "tpu")
    assert found.total == pytest.approx(step["peak"], rel=0.1)


def test_there_are_ten_of_them():
    assert len(COMPILED) >= 10 and len({step["size"] for step in COMPILED}) >= 4


def test_each_policy_keeps_less_than_the_one_before():
    (stage,) = parse_config("{model: {size: 7b, ffn_width: 11264}, data: {}}").stage_list
    order = "none", "save_products", "save_feed_forward", "save_attention", "full"
    kept = [memory.kept_bytes(dataclasses.replace(stage.model, remat=remat), tp=4) for remat in order]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)
    assert kept[-1] == 2 * 4096  # the stream is not cut over tp
    assert kept[-2] == 2 * (4096 + 1024) + 4 * 8


def test_offload_keeps_in_the_host_what_save_attention_keeps_on_the_device():
    text = (
        '{model: {size: 1b, remat: %s}, data: {}, training: {seq_len: 65536, batch_size: 1}, mesh: {shape: "1,1,1,-1"}}'
    )
    device, host = (
        memory.of_stage(parse_config(text % remat).stage_list[0], (1, 1, 1, 8), "gpu")
        for remat in ("save_attention", "offload")
    )
    assert host.host == device.kept > 0 and host.kept == 0 and host.total < device.total


def _stage(step):
    overrides = [(f"model.{name}", str(step[name])) for name in ("dtype", "remat", "ffn_chunk") if step.get(name)]
    overrides += [("model.vision_vocab_size", "0")] * (not step.get("vision", True))
    overrides += [(f"model.{name}", str(value)) for name, value in step.get("model", {}).items()]
    text = "{model: {size: %s}, data: {}, training: {seq_len: %d, batch_size: %d}, mesh: {shape: '%s'}}"
    values = step["size"], step["seq_len"], step["batch_size"], step["mesh"]
    return parse_config(text % values, overrides=overrides).stage_list[0]
