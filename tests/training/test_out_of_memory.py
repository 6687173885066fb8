"""Out of memory is told with the arrays that are there, and what needs less."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ringjax.planning import advice as planned
from ringjax.training.load import parse_config
from ringjax.training.mesh import make_mesh
from ringjax.training.out_of_memory import OutOfMemory, explained, on_each_device
from ringjax.training.task import TrainState

SMALL = """
{model: {size: debug, vocab_size: 512, vision_codes: 64, vision_vocab_size: 68, remat: none}, data: {vision_codes: 64},
 training: {seq_len: 8192, batch_size: 8}, mesh: {shape: "2,1,1,4"}}
"""


def state():
    mesh = make_mesh("2,1,1,4")

    def array(spec, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = {"small": array(PartitionSpec(), 8, dtype=jnp.bfloat16), "large": array(PartitionSpec("sp"), 64, 64)}
    return TrainState(array(PartitionSpec(), dtype=jnp.int32), params, {"mu": array(PartitionSpec(), 32, 64)})


def test_sizes_are_those_of_one_device_and_the_largest_come_first():
    assert on_each_device(state()) == [
        ("optimizer.mu", "float32[32,64]", 8192),
        ("params.large", "float32[16,64]", 4096),
        ("params.small", "bfloat16[8]", 16),
    ]


def test_what_the_allocator_says_is_told_with_the_largest_arrays():
    (stage,) = parse_config(SMALL).stage_list
    with pytest.raises(OutOfMemory) as caught, explained(stage, state()):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
    said = str(caught.value)
    assert "out of memory in stage 'train': RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes." in said
    assert "largest arrays on each device: optimizer.mu float32[32,64] 0.00781 MiB; params.large" in said
    assert caught.value.stage is stage
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explained(stage, state()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_advice_is_the_planners_arithmetic_and_each_line_needs_less():
    (stage,) = parse_config(SMALL).stage_list
    first, *lines, last = planned.advice(stage)
    needed = planned.memory.of_stage(stage, (2, 1, 1, 4), "gpu").total / 2**30
    assert f"a device needs {needed:.3g} GiB" in first and last.startswith("ringjax plan CONFIG")
    assert lines and any("--model.remat full" in line for line in lines)
    for line in lines:
        (option, value), said = line.split(":")[0].split(), float(line.split(":")[1].split()[0])
        section, field = option.removeprefix("--").split(".")
        part = getattr(stage, section)
        typed = type(getattr(part, field))(value) if getattr(part, field) is not None else int(value)
        changed = dataclasses.replace(stage, **{section: dataclasses.replace(part, **{field: typed})})
        sizes = tuple(int(n) for n in changed.mesh.shape.split(","))
        assert said == float(f"{planned.memory.of_stage(changed, sizes, 'gpu').total / 2**30:.3g}") < needed


def test_what_is_no_transformer_gets_no_advice():
    assert planned.advice(object()) == []
