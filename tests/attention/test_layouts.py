"""A layout is two functions; the permutation and the hops follow from them."""

import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax.attention.ring import _group_offsets

LAYOUTS = list(rj.layouts.LAYOUTS)
SIZES = [(1, 4), (2, 6), (3, 4), (4, 2), (8, 6)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size, length", SIZES)
def test_slots_are_ascending_and_cover_the_sequence(layout, ring_size, length):
    order = rj.layouts.get(layout)
    shards = [np.asarray(order.slots(shard, ring_size, length)) for shard in range(ring_size)]
    assert all((np.diff(slots) > 0).all() for slots in shards)
    assert sorted(np.concatenate(shards)) == list(range(ring_size * length))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size, length", SIZES)
def test_slots_below_counts_slots(layout, ring_size, length):
    order = rj.layouts.get(layout)
    x = np.arange(-5, ring_size * length + 6)
    for shard in range(ring_size):
        slots = np.asarray(order.slots(shard, ring_size, length))
        counted = (slots[None] < x[:, None]).sum(1)
        assert np.array_equal(order.slots_below(jnp.asarray(x), shard, ring_size, length), counted)


@pytest.mark.parametrize("library", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size, length", SIZES)
def test_permute_puts_slots_in_order_and_restore_undoes_it(layout, ring_size, length, library):
    order, total = rj.layouts.get(layout), ring_size * length
    expected = np.concatenate([order.slots(shard, ring_size, length) for shard in range(ring_size)])
    assert np.array_equal(order.permute(library.arange(total), ring_size, 0), expected)
    x = library.arange(3 * total * 2).reshape(3, total, 2)
    for axis in (1, -2):
        moved = order.permute(x, ring_size, axis)
        assert isinstance(moved, type(x)) and np.array_equal(moved, np.asarray(x)[:, expected])
        assert np.array_equal(order.restore(moved, ring_size, axis), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size, length", SIZES)
def test_offsets_name_every_hop_that_somebody_needs(layout, ring_size, length):
    order, total = rj.layouts.get(layout), ring_size * length
    owner = np.empty(total, int)
    for shard in range(ring_size):
        owner[np.asarray(order.slots(shard, ring_size, length))] = shard
    query, key = np.indices((total, total))
    for behind in (0, 1, 2, 3, 5, total // 4, total):
        for ahead in (0, 1, 4):
            seen = (key >= query - behind) & (key <= query + ahead)
            needed = {int(d) for d in np.unique((owner[query] - owner[key])[seen] % ring_size)}
            offered = order.offsets(behind, ahead, ring_size, length)
            assert needed <= set(offered) and offered[0] == 0
            if ring_size == 8 and behind <= 2 and ahead == 0:
                assert len(offered) < ring_size
            for width in (2, 4):
                if ring_size % width == 0:
                    groups = {int(d) for d in np.unique((owner[query] // width - owner[key] // width)[seen])}
                    found = _group_offsets(offered, ring_size // width, width)
                    assert {d % (ring_size // width) for d in groups} <= set(found)


def test_zigzag_needs_two_chunks_a_shard():
    with pytest.raises(ValueError, match=r"seq_len 1000 cannot be cut into 2·sp = 16 chunks.*pad to 1008 or use 'str"):
        rj.layouts.get("zigzag").permute(np.arange(1000), 8, 0)
    with pytest.raises(ValueError, match=r"seq_len 10 cannot be cut into 4 shards for layout 'striped'; pad to 12$"):
        rj.layouts.get("striped").permute(np.arange(10), 4, 0)


def test_unknown_layout_names_the_nearest():
    with pytest.raises(ValueError, match="unknown layout 'stripped'.*did you mean 'striped'"):
        rj.layouts.get("stripped")
