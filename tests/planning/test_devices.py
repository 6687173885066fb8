"""Targets: what people write, and what is said when it is wrong."""

import pytest

from ringjax.planning.devices import DEVICES, GIB, Target


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
    assert target.link(8) == pytest.approx(270e9) and target.link(16) == pytest.approx(30e9)
    assert Target.parse("tpu:v4:8x8x16").link(1024) == Target.parse("tpu:v4:8x8x16").link(2)
