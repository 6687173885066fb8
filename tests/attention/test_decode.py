"""Decoding equals the last rows of full attention, with the cache whole or sharded in any layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ringjax as rj
from tests.attention import cases, oracle

SLOTS = 32
LENGTHS = np.array([32, 7, 17])


def case(new: int):
    """q `[3, new, 4, 8]` and caches whose slots past the length hold garbage."""
    q, k, v, *_ = cases.inputs(3, new, 4, 2, 8, 4, keys=SLOTS)
    unused = (np.arange(SLOTS) >= LENGTHS[:, None])[..., None, None]
    return q, jnp.where(unused, 1e9, k), jnp.where(unused, -1e9, v)


def expected(q, k, v, window=None):
    new = q.shape[1]
    index = LENGTHS[:, None] - new + np.arange(new)
    start = np.maximum(index - (SLOTS if window is None else window - 1), 0)
    zero = np.zeros((3, 4, new)), np.zeros((*q.shape[:3], v.shape[-1]))
    return oracle.attention(q, k, v, start, index + 1, zero[1], zero[0])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_one_device(new, window, backend):
    q, k, v = case(new)
    out, lse = rj.decode_attention(q, k, v, lengths=LENGTHS, window=window, backend=backend, return_lse=True)
    oracle_ = expected(q, k, v, window)
    assert oracle.error(out, oracle_.out) <= oracle.FLOAT32 and oracle.error(lse, oracle_.lse) <= oracle.FLOAT32


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
@pytest.mark.parametrize("ring_size", [2, 8])
def test_sharded_cache(layout, ring_size, window):
    q, k, v = case(3)
    order = rj.layouts.get(layout)
    decode = functools.partial(
        rj.decode_attention, lengths=jnp.asarray(LENGTHS), axis_name="sp", layout=layout, window=window, return_lse=True
    )
    mapped = jax.jit(
        jax.shard_map(decode, mesh=cases.mesh(ring_size), in_specs=(P(), P(None, "sp"), P(None, "sp")), out_specs=P())
    )
    caches = (order.permute(x, ring_size, 1) for x in (k, v))
    out, lse = mapped(q, *caches)
    oracle_ = expected(q, k, v, window)
    assert oracle.error(out, oracle_.out) <= oracle.FLOAT32 and oracle.error(lse, oracle_.lse) <= oracle.FLOAT32


def test_sharded_cache_is_not_moved():
    """What crosses devices does not depend on the length of the cache."""
    def collectives(slots: int) -> list[str]:
        q, kv = jnp.zeros((1, 1, 4, 8)), jnp.zeros((1, slots, 2, 8))
        decode = functools.partial(rj.decode_attention, lengths=jnp.array([9]), axis_name="sp")
        mapped = jax.shard_map(
            decode, mesh=cases.mesh(8), in_specs=(P(), P(None, "sp"), P(None, "sp")), out_specs=P()
        )
        text = jax.jit(mapped).lower(q, kv, kv).compile().as_text()
        assert not any(word in text for word in ("all-gather", "collective-permute", "all-to-all"))
        return sorted(line.split(" = ")[1].split(" ")[0] for line in text.splitlines() if " all-reduce(" in line)

    assert collectives(64) == collectives(1024) != []


def test_reach_is_clipped_to_the_length():
    q, k, v = case(1)
    wide = rj.Reach(jnp.full((3, 1), 99, jnp.int32), jnp.full((3, 1), 99, jnp.int32))
    assert oracle.error(rj.decode_attention(q, k, v, lengths=LENGTHS, reach=wide), expected(q, k, v).out) <= 1e-5


def test_wrong_lengths():
    q, k, v = case(1)
    with pytest.raises(ValueError, match=r"one integer a row, shape \(3,\)"):
        rj.decode_attention(q, k, v, lengths=np.array([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="one integer a row"):
        rj.decode_attention(q, k, v, lengths=5)
