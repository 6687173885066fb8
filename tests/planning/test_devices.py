"""Targets: what people write, and what is said when it is wrong."""

import pytest

from ringjax.planning import communication
from ringjax.planning.devices import DEVICES, GIB, Target
from ringjax.training.load import parse_config


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_complete(name):
    device = DEVICES[name]
    assert device.flops > 1e14 and device.bandwidth > 5e11 and device.link >= 5e10
    assert 10 * GIB < device.usable <= device.memory
    assert device.platform == ("gpu" if name[0] in "abh" else "tpu")


@pytest.mark.parametrize("text, count, libtpu", [
    ("h100:8", 8, None), ("b200", 1, None), ("tpu:v4:8x8x16", 1024, "v4:8x8x16"), ("tpu:v5e:16x16", 256, "v5e:16x16"),
    ("v5p:4x8x8", 256, "v5p:4x8x8"), ("tpu:7x:2x2x1", 8, "tpu7x:2x2x1"),
])  # fmt: skip
def test_targets(text, count, libtpu):
    target = Target.parse(text)
    assert (target.count, target.libtpu) == (count, libtpu)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text, message", [
    ("h10:8", "unknown device 'h10'; did you mean 'h100'?"),
    ("tpu:h100:8", "unknown device 'h100'"),
    ("h100:0", "'0' is no number of GPUs"),
    ("h100:eight", "'eight' is no number of GPUs"),
    ("h100:8:8", "a device and how many"),
    ("tpu:v5p:4x8x8:0", "'0' is no number of slices; write tpu:v5p:4x8x8:2"),
    ("tpu:v5p:4x8x8:2:2", "a device and how many"),
    ("tpu:v5p", "a device and how many"),
    ("tpu:v5p:4x8", "'4x8' is no shape of a v5p slice, which has 3 dimensions; write tpu:v5p:4x8x8"),
    ("tpu:v5e:8", "write tpu:v5e:16x16"),
])  # fmt: skip
def test_what_is_no_target_is_refused(text, message):
    with pytest.raises(ValueError) as refused:
        Target.parse(text)
    assert message in str(refused.value) and repr(text) in str(refused.value)


def test_a_ring_over_several_hosts_of_gpus_takes_the_slow_link():
    target = Target.parse("h100:64")
    assert communication._link((8, 1, 1, 8), target) == pytest.approx(270e9)
    assert communication._link((4, 1, 1, 16), target) == pytest.approx(30e9)
    pod = Target.parse("tpu:v4:8x8x16")
    assert communication._link((1, 1, 1, 1024), pod) == communication._link((512, 1, 1, 2), pod) == 40e9


@pytest.mark.parametrize(
    "sizes, axes, found",
    [
        ((8, 1, 1, 8), (), 8), ((4, 1, 1, 16), ("sp",), 8), ((1, 4, 4, 4), ("fsdp", "sp"), 4),
        ((1, 8, 2, 4), ("tp",), 2), ((1, 16, 1, 4), ("fsdp", "sp"), 8), ((16, 1, 1, 4), ("dp",), 2),
    ],
)  # fmt: skip
def test_which_devices_of_a_mesh_share_a_host_of_eight(sizes, axes, found):
    assert communication.near(sizes, Target.parse("h100:64"), *axes) == found


def test_a_collective_crosses_with_each_byte_once_a_host():
    """64 GPUs gather 640 MB: 70 come to each GPU from its like on 7 other hosts, and 560 from those of its own."""
    target = Target.parse("h100:64")
    found = communication._collective((1, 1, 1, 64), target, ("fsdp", "sp"), 640e6)
    assert found == pytest.approx(80e6 * 7 / 8 / 30e9 + 640e6 * 7 / 8 / 270e9)
    alone = communication._collective((1, 1, 1, 8), Target.parse("h100:8"), ("sp",), 640e6)
    assert alone == pytest.approx(560e6 / 270e9)
    torus = communication._collective((1, 1, 1, 256), Target.parse("tpu:v5e:16x16"), ("sp",), 256e6)
    assert torus == pytest.approx(255e6 / 80e9)


def test_a_sum_is_scattered_and_gathered():
    """All-reduce: gradients over dp once a step; the stream over tp four times a layer, five where it is made again."""
    text = "{model: {size: 1b, vision_vocab_size: 0, remat: %s}, data: {}, training: {seq_len: 8192, batch_size: 8}}"
    target = Target.parse("h100:8")
    for remat, sums in (("save_products", 4), ("full", 5)):
        stage = parse_config(text % remat).stage_list[0]
        found = communication._copies(stage, (8, 1, 1, 1), target)
        assert found.exposed == pytest.approx(2 * 7 / 8 * 4 * stage.model.parameter_count() / 270e9)
        found = communication._sums(stage, (1, 1, 8, 1), target)
        assert found.exposed == pytest.approx(2 * 7 / 8 * sums * 8 * 8192 * stage.model.width * 2 / 270e9)


def test_slices_are_joined_by_the_data_center_network():
    """25 Gb/s a v5e chip, of which a ring gets 80 %; along dp first, then fsdp, then sp, never tp."""
    target = Target.parse("tpu:v5e:16x16:2")
    assert (target.count, target.slices, str(target)) == (512, 2, "tpu:v5e:16x16:2")
    assert Target.parse("tpu:v5e:16x16:1") == Target.parse("tpu:v5e:16x16")
    for sizes, across in (((2, 1, 1, 256), "dp"), ((1, 2, 1, 256), "fsdp"), ((1, 1, 2, 256), "sp")):
        here = {axis: communication.near(sizes, target, axis) for axis in ("dp", "fsdp", "tp", "sp")}
        assert here == {axis: size // (2 if axis == across else 1) for axis, size in zip(here, sizes)}
        assert communication._link(sizes, target) == pytest.approx(2.5e9 if across == "sp" else 40e9)
