"""The mesh string and the devices it asks for."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ringjax.training.mesh import across_slices, lies_over, make_mesh, resolve_shape, simulate_devices


@pytest.mark.parametrize(
    "shape, devices, expected",
    [
        ("1,-1,4,1", 512, (1, 128, 4, 1)),
        ("1,-1,16,4", 512, (1, 8, 16, 4)),
        ("-1,1,1,4", 8, (2, 1, 1, 4)),
        (" 1, 1, 1, -1 ", 1, (1, 1, 1, 1)),
        ("2,2,2,1", 8, (2, 2, 2, 1)),
    ],
)
def test_one_axis_is_inferred(shape, devices, expected):
    assert resolve_shape(shape, devices) == expected


@pytest.mark.parametrize("shape", ["", "1,1,1", "1,1,1,1,1", "0,1,1,1", "-2,1,1,1", "a,1,1,1", "1,1,1,1.5", "1;1;1;1"])
def test_what_is_no_mesh_is_refused(shape):
    with pytest.raises(ValueError, match="must be four numbers"):
        resolve_shape(shape, 8)


def test_wrong_products_are_explained():
    with pytest.raises(ValueError, match=r"asks for 16 devices \(dp 2 · fsdp 1 · tp 1 · sp 8\) and there are 8"):
        resolve_shape("2,1,1,8", 8)
    with pytest.raises(ValueError, match="8 devices cannot be divided by 3 .* to infer dp"):
        resolve_shape("-1,1,1,3", 8)
    with pytest.raises(ValueError, match="uses 2 of 8 devices"):
        resolve_shape("2,1,1,1", 8)


def test_mesh_has_auto_axes_in_order():
    mesh = make_mesh("2,1,1,-1")
    assert dict(mesh.shape) == {"dp": 2, "fsdp": 1, "tp": 1, "sp": 4}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert list(mesh.devices.ravel()) == jax.devices()


def test_more_simulated_devices_than_a_running_jax_has_are_refused():
    have = len(jax.devices("cpu"))
    simulate_devices(0)
    simulate_devices(have)
    with pytest.raises(ValueError, match=f"JAX runs already with {have} CPU devices"):
        simulate_devices(have + 1)


def test_an_axis_of_a_slice_is_cut_where_the_mesh_asks_for_it():
    """tp 2 and sp 32 on 4 × 4 × 4 chips: neither is a product of whole axes with the other's."""
    pytest.importorskip("libtpu", reason="libtpu is not installed (the extra 'tpu')")
    from ringjax.planning.ahead import slice_devices

    mesh = make_mesh("1,1,2,32", slice_devices("v4:4x4x4"))
    assert dict(mesh.shape) == {"dp": 1, "fsdp": 1, "tp": 2, "sp": 32} and len(set(mesh.devices.flat)) == 64


@pytest.mark.parametrize(
    "sizes, slices, found",
    [
        ((2, 1, 1, 16), 2, (2, 1, 1, 1)),
        ((1, 4, 1, 8), 2, (1, 2, 1, 1)),
        ((1, 1, 2, 16), 4, (1, 1, 1, 4)),
        ((2, 3, 1, 8), 12, (2, 3, 1, 2)),
        ((3, 5, 7, 9), 1, (1, 1, 1, 1)),
    ],
)
def test_slices_lie_along_copies_first_and_never_along_tp(sizes, slices, found):
    assert across_slices(sizes, slices) == found and lies_over(sizes, slices)


def test_a_mesh_that_would_cut_tp_between_slices_is_refused():
    assert not lies_over((1, 1, 16, 1), 2)
    with pytest.raises(ValueError, match="mesh 1,3,16,1 cannot be laid over 2 TPU slices: .* tp stays inside a slice"):
        across_slices((1, 3, 16, 1), 2)


def test_a_ring_goes_around_each_slice_before_the_next():
    """Two slices of 4 × 4 chips: along sp they follow each other; in each, and from one to the next, by neighbours."""
    pytest.importorskip("libtpu", reason="libtpu is not installed (the extra 'tpu')")
    from ringjax.planning.ahead import slice_devices

    chips = slice_devices("v5e:4x4:2")
    ring = make_mesh("1,1,1,32", chips).devices.ravel()
    assert [chip.slice_index for chip in ring] == [0] * 16 + [1] * 16
    for part in (ring[:16], ring[16:]):
        coords = np.array([chip.coords for chip in part])
        assert (np.abs(coords - np.roll(coords, 1, axis=0)).sum(axis=1) == 1).all() and len(set(part)) == 16
    assert [chip.coords for chip in ring[:16]] == [chip.coords for chip in ring[16:]]  # so each sends to its like
    mesh = make_mesh("2,1,2,8", chips).devices
    assert {chip.slice_index for chip in mesh[0].flat} == {0} and {chip.slice_index for chip in mesh[1].flat} == {1}
    mesh = make_mesh("1,1,2,16", chips).devices
    assert {chip.slice_index for chip in mesh[..., :8].flat} == {0} and len(set(mesh.flat)) == 32


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a mesh asks of one of eight GPUs of a host."""

    id: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    slice_index: int = 0

    @property
    def process_index(self) -> int:
        return self.id // 8


@pytest.mark.parametrize("shape, hosts", [("1,1,1,32", 4), ("2,1,1,16", 2), ("1,1,2,16", 2), ("1,1,8,4", 1)])
def test_neighbours_of_a_ring_are_inside_a_host_first(shape, hosts):
    """Along sp a ring crosses each boundary between two of its hosts once, and no more of them than it must."""
    devices = make_mesh(shape, [Gpu(i) for i in range(32)]).devices
    for ring in devices.reshape(-1, devices.shape[-1]):
        places = [device.process_index for device in ring]
        crossed = sum(a != b for a, b in zip(places, [*places[1:], places[0]]))
        assert len(set(places)) == hosts and crossed == (0 if hosts == 1 else hosts)
