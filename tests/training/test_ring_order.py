"""Rings through boxes of chips: every chip once, every step to a neighbour."""

import itertools

import numpy as np
import pytest

from ringjax.training.ring_order import cycle, ring_order


def box(sizes):
    return np.array(list(itertools.product(*map(range, sizes))))


@pytest.mark.parametrize("sizes", [(2, 4), (4, 4, 1), (16, 16, 1), (3, 4), (4, 3), (8, 8, 16), (3, 5, 2), (1, 6, 7)])
def test_every_step_is_to_a_neighbour(sizes):
    walk = np.array(cycle(sizes))
    assert sorted(map(tuple, walk.tolist())) == sorted(map(tuple, box(sizes).tolist()))
    assert (np.abs(walk - np.roll(walk, 1, axis=0)).sum(axis=1) == 1).all()


def test_the_order_is_of_the_chips_as_they_are_given():
    rng = np.random.default_rng(0)
    coords = rng.permutation(box((4, 8)) * 2 + 1)  # a part of a slice: neighbours are 2 apart there
    order = ring_order(coords)
    ring = coords[order]
    assert (
        sorted(order.tolist()) == list(range(32)) and (np.abs(ring - np.roll(ring, 1, axis=0)).sum(axis=1) == 2).all()
    )


@pytest.mark.parametrize("sizes", [(8,), (1, 1, 8), (3, 5), (1, 1, 1)])
def test_where_there_is_none_nothing_changes(sizes):
    assert ring_order(box(sizes)) is None


def test_what_is_a_ring_already_stays():
    ring = np.array(cycle((4, 4)))
    assert ring_order(ring) is None and ring_order(ring[::-1]) is None
    assert ring_order(np.delete(box((4, 4)), 5, axis=0)) is None  # no box


def test_a_mesh_over_a_slice_is_such_a_ring_for_every_row_of_devices():
    pytest.importorskip("libtpu", reason="libtpu is not installed (the extra 'tpu')")
    from ringjax.planning.ahead import slice_devices
    from ringjax.training.mesh import make_mesh

    mesh = make_mesh("1,4,1,64", slice_devices("v5e:16x16"))
    assert len(set(mesh.devices.flat)) == 256
    for ring in mesh.devices[0, :, 0]:
        coords = np.array([device.coords for device in ring])
        steps = np.abs(coords - np.roll(coords, 1, axis=0))
        assert (np.count_nonzero(steps, axis=1) == 1).all() and steps.sum(axis=1).max() <= 4
