"""Bytes on the wire, against the transfers in the compiled program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ringjax as rj
from ringjax.planning.traffic import Traffic, hidden_from
from tests.attention import cases

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, V_DIM = 2, 64, 4, 2, 8, 4
BYTES = {"f32": 4, "bf16": 2, "s32": 4}


def sent(function, *arrays) -> int:
    """The bytes that one device passes on in `function`, as written in the program that is given to XLA.

    Before XLA's passes: its CPU backend moves bfloat16 as float32, which TPU and GPU do not.
    """
    text = jax.jit(function).lower(*arrays).as_text("hlo")
    shapes = re.findall(r"= (\w+)\[([\d,]+)\]\S* collective-permute\(", text)
    return sum(BYTES[kind] * int(np.prod([int(size) for size in shape.split(",")])) for kind, shape in shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout, ring_size, window, v_dim", [
    ("striped", 8, None, V_DIM), ("zigzag", 4, None, HEAD_DIM), ("contiguous", 8, 9, V_DIM),
    ("striped", 1, None, V_DIM),
])  # fmt: skip
def test_bytes_are_those_of_the_program(layout, ring_size, window, v_dim, dtype):
    q, k, v, dout, _ = cases.inputs(BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, v_dim, dtype)
    spec = P(None, "sp")
    local = functools.partial(rj.ring_attention, axis_name="sp", layout=layout, window=window, unroll=True)
    forward = jax.shard_map(local, mesh=cases.mesh(ring_size), in_specs=spec, out_specs=spec)
    expected = Traffic.of(layout, ring_size, LENGTH, kv_heads=KV_HEADS, head_dim=HEAD_DIM, v_dim=v_dim, batch=BATCH,
                          dtype=dtype, window=window)  # fmt: skip
    assert sent(forward, q, k, v) == expected.forward
    both = lambda q, k, v, dout: jax.vjp(forward, q, k, v)[1](dout)  # noqa: E731
    assert sent(both, q, k, v, dout) == expected.forward + expected.backward


def test_a_ring_of_eight():
    """64 tokens a device, 2 heads of 8 + 4 numbers: 7 rotations forward; 7, and 7 of the sums, backward."""
    found = Traffic.of("striped", 8, 512, kv_heads=2, head_dim=8, v_dim=4)
    assert found == Traffic(rotations=7, kv=64 * 2 * 12 * 2, sums=64 * 2 * 12 * 4)
    assert (found.forward, found.backward) == (7 * found.kv, 7 * (found.kv + found.sums))


def test_a_window_sends_less():
    """Contiguous: a window of one shard needs the neighbour alone, so one rotation of seven is left."""
    options = dict(kv_heads=8, head_dim=128)
    assert Traffic.of("contiguous", 8, 8192, window=1024, **options).rotations == 1
    assert Traffic.of("contiguous", 8, 8192, **options).rotations == 7


def test_shortest_hidden_shard():
    """Ring Attention's c ≥ F / B; a causal mask halves the compute, grouped heads divide the bytes."""
    assert hidden_from(600e12, 300e9, heads=32, kv_heads=32, visible=1.0) == pytest.approx(2000)
    assert hidden_from(600e12, 300e9, heads=32, kv_heads=32) == pytest.approx(4000)
    assert hidden_from(600e12, 300e9, heads=32, kv_heads=8) == pytest.approx(1000)
    assert hidden_from(600e12, 300e9, heads=32, kv_heads=8, dtype="float32") == pytest.approx(2000)
