"""What the compiler says, where it is asked: figures of programs that fit, and of those that do not."""

import types

import pytest

from ringjax.planning import compiled, hlo, memory
from ringjax.planning.devices import Target
from ringjax.training.load import parse_config

# As libtpu 0.0.42 says it.
LATE = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 30.83G of 30.75G hbm. Exceeded hbm capacity by 88.04M.

  Largest program allocations in hbm:

  1. Size: 25.80G
     Operator: op_name="jit(step)/attention/jit(_sharded)/shard_map/jit(attend)/closed_call/broadcast_in_dim"
     Shape: f32[127,1,131072,4,100]{2,4,3,1,0:T(8,128)}
"""
EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.31G) exceeds"
    " available HBM (15.75G)."
)


def test_a_program_that_does_not_fit_is_read_from_the_message():
    said = compiled.overflow(LATE, 9.0)
    assert not said.fits and said.used == 30.83 * 2**30 and said.limit == 30.75 * 2**30 and said.seconds == 9.0
    assert "needs 30.83 GiB of 30.75, 0.08 too many" in said.problem
    assert "f32[127,1,131072,4,100] (broadcast_in_dim), 25.80 GiB" in said.problem
    early = compiled.overflow(EARLY, 1.0)
    assert early.used == 24.31 * 2**30 and "8.56 too many" in early.problem


def test_rotations_between_slices_are_counted_though_they_have_no_scope():
    def transfer(scope: str, across: bool = False) -> hlo.Transfer:
        return hlo.Transfer("bf16", (8,), 1, (), scope, across)

    one, two = Target.parse("tpu:v5e:4x4"), Target.parse("tpu:v5e:4x4:2")
    rotation, weights = transfer("jit(step)/ring/rotate_inside/ppermute"), transfer("jit(step)/gather")
    unnamed = transfer("")
    network = transfer("ppermute.5_0", across=True)
    for target, counted in ((one, [True, False, False, True]), (two, [True, False, True, True])):
        found = [compiled._is_rotation(x, target) for x in (rotation, weights, unnamed, network)]
        assert found == counted


def test_another_failure_is_no_answer_about_memory():
    with pytest.raises(RuntimeError, match="the step does not compile: INTERNAL: Mosaic failed"):
        compiled.overflow("INTERNAL: Mosaic failed\nmore", 1.0)


def small(shape: str, seq_len: int):
    text = "{model: {size: debug, remat: full}, data: {}, training: {seq_len: %d, batch_size: 1}, mesh: {shape: '%s'}}"
    return parse_config(text % (seq_len, shape)).stage_list[0]


@pytest.mark.slow
def test_a_step_for_a_slice():
    pytest.importorskip("libtpu", reason="libtpu is not installed (the extra 'tpu')")
    target = Target.parse("tpu:v5e:2x4")
    stage = small("1,1,1,8", 16384)
    said, counted = compiled.compile_stage(stage, target), memory.of_stage(stage, (1, 1, 1, 8), "tpu")
    stored = counted.parameters + counted.optimizer + counted.batch
    assert said.fits and said.arguments == pytest.approx(stored, rel=0.05)  # small arrays are padded to tiles
    assert stored < said.used < said.limit
    # 2 layers; forward, again under remat, backward with the sums: 7 rotations each, of K and V.
    assert said.hidden + said.exposed == 2 * 2 * 7 * 4


@pytest.mark.slow
def test_a_step_that_does_not_fit():
    pytest.importorskip("libtpu", reason="libtpu is not installed (the extra 'tpu')")
    said = compiled.compile_stage(small("1,1,1,4", 2**25), Target.parse("tpu:v5e:2x2"))
    assert not said.fits and said.used > said.limit == 15.75 * 2**30


def test_what_lies_in_the_host_s_memory_is_no_device_s_peak():
    """libtpu's peak counts both: of 7B's offloaded step at 1M tokens it says 68 GiB for chips of 31."""
    sizes = dict(argument_size_in_bytes=330679296, temp_size_in_bytes=26394470400, peak_memory_in_bytes=73412365824)
    assert compiled.peak(types.SimpleNamespace(host_temp_size_in_bytes=73081552896, **sizes)) == 330679296 + 26394470400
    assert compiled.peak(types.SimpleNamespace(host_temp_size_in_bytes=0, **sizes)) == 73412365824
