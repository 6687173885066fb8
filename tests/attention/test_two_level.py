"""A ring of rings gives the float64 result for every layout, host size, mask and type, and crosses hosts seldom."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax.attention import strategies
from ringjax.attention.ring import Ring
from ringjax.attention.two_level import Turn, TwoLevel
from tests.attention import cases, hlo, oracle
from tests.attention.test_ring import BATCH, LENGTH, check, ring

GQA = cases.HEADS["gqa"]


@pytest.mark.parametrize("layout, ring_size, host_size, unroll", [
    ("striped", 8, 2, False), ("striped", 6, 3, True), ("zigzag", 8, 2, True), ("zigzag", 8, 4, False),
    ("contiguous", 8, 4, True), ("contiguous", 6, 2, None),
])  # fmt: skip
def test_two_levels_equal_float64(layout, ring_size, host_size, unroll):
    check(ring(layout, ring_size, strategy="two_level", host_size=host_size, unroll=unroll), GQA, jnp.float32)


def test_bfloat16_loses_no_more_than_one_device():
    check(ring("striped", 8, strategy="two_level", host_size=4), GQA, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("host_size", [1, 8])
def test_one_device_a_host_or_one_host(host_size):
    check(ring("striped", 8, strategy="two_level", host_size=host_size), GQA, jnp.float32)


@pytest.mark.parametrize("ring_size, host_size", [(8, 2), (12, 3)])
@pytest.mark.parametrize("turn", [0, 1, 3])
def test_every_shard_visits_every_device_once(ring_size, host_size, turn):
    """The schedule alone: turn o, hop i shows device l of host m the shard (m − o, l − i)."""
    order = rj.layouts.get("striped")
    seen = np.array([
        [Turn(order, "sp", ring_size, (0,), inside=host_size, turn=o)._source(device, i)
         for o in range(ring_size // host_size) for i in range(host_size)]
        for device in range(ring_size)
    ])  # fmt: skip
    assert (np.sort(seen, axis=1) == np.arange(ring_size)).all()
    assert (seen[:, turn * host_size] // host_size == (np.arange(ring_size) // host_size - turn) % (
        ring_size // host_size)).all()  # fmt: skip


@pytest.mark.parametrize("layout, window, causal", [
    ("contiguous", 1, True), ("contiguous", 12, True), ("contiguous", 30, False), ("zigzag", 7, True),
])  # fmt: skip
def test_windows_visit_fewer_hosts(layout, window, causal):
    order, size = rj.layouts.get(layout), 8
    arrays = cases.inputs(BATCH, LENGTH, 2, 1, 8, 8)

    def attend(q, k, v):
        q, k, v = (order.permute(x, size, 1) for x in (q, k, v))
        out, lse = rj.sharded_attention(
            q, k, v, mesh=cases.mesh(size), layout=layout, causal=causal, window=window, return_lse=True,
            strategy="two_level", host_size=2,
        )  # fmt: skip
        return order.restore(out, size, 1), order.restore(lse, size, 2)

    g = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
    behind = np.minimum(g, window - 1)
    ahead = np.zeros_like(g) if causal else np.minimum(LENGTH - 1 - g, window - 1)
    found = jax.jit(lambda *a: cases.results(attend, *a))(*arrays)
    assert max(oracle.errors(found, cases.expected(*arrays, behind, ahead))) <= oracle.FLOAT32


@pytest.mark.parametrize("window, turns", [(1, 1), (2, 2), (13, 2), (14, 3), (20, 3), (26, 4), (None, 4)])
def test_hosts_that_a_window_needs(window, turns):
    """8 shards of 6 tokens, 2 a host: the first query of a host sees `window` − 1 tokens of those before it."""
    behind = None if window is None else window - 1
    ring = Ring.of(rj.layouts.get("contiguous"), "sp", 8, length=6, max_behind=behind, max_ahead=0)
    assert TwoLevel.of(ring, 2).turns == turns


def collectives(strategy: str, host_size: int | None, gradient: bool) -> list[set[tuple[int, int]]]:
    """The pairs of every collective-permute of the compiled program, unrolled."""
    arrays = cases.inputs(1, 64, 2, 2, 8, 8)[:3]
    attend = functools.partial(
        rj.sharded_attention, mesh=cases.mesh(8), strategy=strategy, host_size=host_size, unroll=True, backend="xla"
    )
    loss = lambda q, k, v: jnp.sum(attend(q, k, v))  # noqa: E731
    function = jax.grad(loss, (0, 1, 2)) if gradient else attend
    return hlo.permuted_pairs(jax.jit(function).lower(*arrays).compile().as_text())


def crossings(pairs: list[set[tuple[int, int]]], host_size: int) -> int:
    return sum(any(a // host_size != b // host_size for a, b in some) for some in pairs)


def test_hosts_are_crossed_once_a_turn():
    """R = 8, L = 4: 7 rotations of the plain ring cross hosts, and 1 of the two-level one, with all devices at once."""
    plain, double = (collectives(name, size, gradient=False) for name, size in (("ring", None), ("two_level", 4)))
    assert (len(plain), crossings(plain, 4)) == (7, 7)
    assert (len(double), crossings(double, 4)) == (3 + 3 + 1, 1)
    (across,) = [some for some in double if crossings([some], 4)]
    assert across == {(i, (i + 4) % 8) for i in range(8)}


def test_backward_crosses_as_seldom():
    """K and V in both passes, and their sums once home. (Some XLAs see that both passes send the same K and V.)"""
    assert crossings(collectives("two_level", 4, gradient=True), 4) in (1 + 1, 1 + 1 + 1)
    plain = collectives("ring", None, gradient=True)
    assert crossings(plain, 4) == len(plain) in (7 + 7, 7 + 7 + 7)


@pytest.mark.parametrize("options, message", [
    (dict(host_size=2), "host_size 2 means nothing to strategy 'ring'"),
    (dict(strategy="ulysses", host_size=2), "host_size 2 means nothing to strategy 'ulysses'"),
    (dict(strategy="two_level", host_size=3), "a ring of 8 devices cannot be cut into hosts of 3"),
    (dict(strategy="two_level", host_size=0), "host_size 0 must be a number of devices"),
    (dict(strategy="two_level", ulysses_size=2), "ulysses_size 2 means nothing to strategy 'two_level'"),
    (dict(strategy="hybrid", ulysses_size=2, host_size=2), "both say how devices group"),
])  # fmt: skip
def test_what_means_nothing_is_refused(options, message):
    arrays = cases.inputs(1, 64, 4, 4, 8, 8)[:3]
    with pytest.raises(ValueError, match=message):
        rj.sharded_attention(*arrays, mesh=cases.mesh(8), **options)


def test_hybrid_groups_inside_a_host():
    """Four heads could be traded among four devices; on hosts of two they are traded among two."""
    arrays = cases.inputs(1, 64, 4, 4, 8, 8)[:3]
    text = {
        size: jax.jit(functools.partial(rj.sharded_attention, mesh=cases.mesh(8), strategy="hybrid", host_size=size))
        .lower(*arrays).compile().as_text()
        for size in (2, 4)
    }  # fmt: skip
    assert "{0,1},{2,3}" in text[2].replace(" ", "") and "{0,1,2,3}" not in text[2].replace(" ", "")
    assert "{0,1,2,3},{4,5,6,7}" in text[4].replace(" ", "")


def test_chips_of_a_slice_are_one_host():
    """Of all devices, or of a ring that crosses slices; GPUs and CPUs go by process."""
    chips = [types.SimpleNamespace(platform="tpu", slice_index=i // 8) for i in range(16)]
    assert strategies.in_slice(chips) == 8 and strategies.in_slice(chips[6:10]) == 2
    assert strategies.in_slice([types.SimpleNamespace(platform="tpu")] * 4) == 4
    assert strategies.in_slice(jax.devices()) is None
