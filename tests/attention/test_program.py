"""What the compiled program of a ring of eight devices does and does not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from tests.attention import cases, hlo

RING = 8
LENGTH = RING * 52  # no other dimension of these programs is as large, so 416 is seen only if something is global
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter")


def compiled(gradient: bool = False, length: int = LENGTH, dtype=jnp.float32, heads=(HEADS, KV_HEADS), **options):
    attend = functools.partial(rj.sharded_attention, mesh=cases.mesh(RING), **options)
    shape = lambda n: jax.ShapeDtypeStruct((1, length, n, HEAD_DIM), dtype, sharding=sharding)  # noqa: E731
    sharding = jax.sharding.NamedSharding(cases.mesh(RING), jax.sharding.PartitionSpec(None, "sp"))
    inputs = [shape(heads[0]), shape(heads[1]), shape(heads[1])]
    if not gradient:
        return jax.jit(attend).lower(*inputs).compile()
    both = lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)  # noqa: E731
    return jax.jit(both).lower(*inputs, shape(heads[0])).compile()


@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "scan"])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_forward_makes_exactly_one_rotation_less_than_devices(layout, unroll):
    text = compiled(layout=layout, unroll=unroll).as_text()
    assert len(hlo.executed(text, "collective-permute")) == RING - 1
    assert not any(hlo.executed(text, name) for name in COLLECTIVES)
    assert LENGTH not in hlo.dimensions(text) and max(hlo.dimensions(text)) < LENGTH


def test_backward_rotates_kv_once_more_and_its_gradients_home():
    """Forward R − 1; backward R − 1 for K and V, and R − 1 for dK and dV: what a device adds to its own never moves."""
    text = compiled(gradient=True, unroll=False).as_text()
    assert len(hlo.executed(text, "collective-permute")) == 3 * (RING - 1)
    assert not any(hlo.executed(text, name) for name in COLLECTIVES)
    assert LENGTH not in hlo.dimensions(text) and max(hlo.dimensions(text)) < LENGTH


def test_unrolled_backward_asks_for_its_own_rotations():
    """Behind a barrier, so that XLA does not keep all visiting K and V alive from the forward pass instead.

    In the program handed to the compiler: the CPU's compiler drops the barrier and shares the rotations.
    """
    attend = functools.partial(rj.sharded_attention, mesh=cases.mesh(RING), unroll=True)
    x = jax.ShapeDtypeStruct((1, LENGTH, 2, HEAD_DIM), jnp.float32)
    lowered = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)).lower(x, x, x, x).as_text()
    assert lowered.count("stablehlo.collective_permute") == 3 * (RING - 1)
    assert "optimization_barrier" in lowered


def test_what_the_reach_alone_decides_is_not_kept_for_all_hops():
    """Under `jax.checkpoint` in a scan over layers, as models have it: which keys a hop sees, and what its branches
    make of that, depends on no parameter, and would be computed once for all hops and kept, stacked over them."""
    reach = rj.Reach.causal(1, LENGTH)
    attend = functools.partial(rj.sharded_attention, mesh=cases.mesh(RING), unroll=False, backend="xla")

    def loss(x, behind, ahead):
        layer = jax.checkpoint(lambda x, _: (attend(x, x, x, reach=rj.Reach(behind, ahead)), None))
        return jax.lax.scan(layer, x, None, length=2)[0].sum()

    x = jax.ShapeDtypeStruct((1, LENGTH, 2, HEAD_DIM), jnp.float32)
    shapes = _shapes(jax.make_jaxpr(jax.grad(loss))(x, reach.behind, reach.ahead).jaxpr)
    assert (1, LENGTH // RING, 2, HEAD_DIM) in shapes  # the walk sees the hops
    tokens = LENGTH // RING
    stacked = {shape for shape in shapes if shape[:1] in ((RING - 1,), (RING - 2,)) and tokens in shape}
    assert not stacked


def _shapes(jaxpr) -> set[tuple[int, ...]]:
    """The shapes of all that a jaxpr computes, inside its loops and branches too."""
    found = {tuple(variable.aval.shape) for equation in jaxpr.eqns for variable in equation.outvars}
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found |= _shapes(inner) if hasattr(inner, "eqns") else set()
    return found


def test_the_counting_sees_a_collective_where_there_is_one():
    """The same reading finds all-gathers in the strategy that makes them."""
    text = compiled(strategy="all_gather").as_text()
    assert hlo.executed(text, "all-gather") and LENGTH in hlo.dimensions(text)
    assert not hlo.executed(text, "collective-permute")


def test_bfloat16_keys_travel_as_bfloat16_and_gradients_as_float32():
    """In the program handed to the compiler; the CPU's compiler widens bfloat16 transfers by itself."""
    attend = functools.partial(rj.sharded_attention, mesh=cases.mesh(RING))
    inputs = [jax.ShapeDtypeStruct((1, LENGTH, n, HEAD_DIM), jnp.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    lowered = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)).lower(*inputs).as_text()
    wires = [line.split("->")[-1].strip() for line in lowered.splitlines() if "collective_permute" in line]
    assert {wire.split("x")[-1].rstrip(">") for wire in wires} == {"bf16", "f32"}
    assert len(wires) == 1 + 3 + 3  # forward; K and V backward: two hops and the rest; dK and dV: the rest, last, home


@pytest.mark.parametrize("layout, rotations", [("contiguous", 1), ("zigzag", 4), ("striped", RING - 1)])
def test_window_of_an_eighth_makes_fewer_rotations(layout, rotations):
    """One neighbour in the contiguous layout, two on each side in zigzag; stripes need all for so wide a window."""
    text = compiled(layout=layout, window=LENGTH // 8).as_text()
    assert len(hlo.executed(text, "collective-permute")) == rotations


def test_stripes_need_few_rotations_for_a_window_of_few_tokens():
    assert len(hlo.executed(compiled(window=3).as_text(), "collective-permute")) == 2


def test_packed_reach_with_a_static_window_makes_fewer_rotations():
    position = jnp.asarray(np.arange(LENGTH)[None] % 100, jnp.int32)
    reach = rj.Reach.packed(position, window=LENGTH // 8)
    text = compiled(layout="contiguous", reach=reach).as_text()
    assert len(hlo.executed(text, "collective-permute")) == 1


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("layout", rj.layouts.LAYOUTS)
def test_temporary_memory_grows_linearly(layout, gradient):
    short, long = (
        compiled(gradient, length, heads=(2, 1), layout=layout).memory_analysis().temp_size_in_bytes
        for length in (RING * 4096, RING * 8192)
    )
    assert long / short <= 2.1, (short, long)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_one_device_memory_grows_linearly(gradient):
    def temporary(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        run = lambda q, k, v: jax.vjp(rj.attention, q, k, v)[1](q) if gradient else rj.attention(q, k, v)  # noqa: E731
        return jax.jit(run).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16384) / temporary(8192) <= 2.1


def test_compile_time_does_not_grow_with_the_ring():
    """In scan form the program of a larger ring has no more instructions."""
    def instructions(ring_size: int) -> int:
        attend = functools.partial(rj.sharded_attention, mesh=cases.mesh(ring_size), unroll=False)
        q = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)
        return len(jax.jit(attend).lower(q, q, q).as_text().splitlines())

    assert instructions(8) <= instructions(4) + 10


def test_saved_attention_is_not_repeated():
    """With a policy that saves out and lse, rematerialisation adds no rotation; without one it adds a forward pass."""
    mesh, names = cases.mesh(RING), ("attention_out", "attention_lse")
    saving = jax.checkpoint_policies.save_only_these_names(*names)

    def rotations(policy) -> int:
        block = jax.checkpoint(lambda q, k, v: rj.sharded_attention(jnp.sin(q), k, v, mesh=mesh).sum(), policy=policy)
        x = jnp.ones((1, LENGTH, 2, 8))
        text = jax.jit(jax.grad(block, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
        return len(hlo.executed(text, "collective-permute"))

    assert rotations(saving) == 3 * (RING - 1)
    assert rotations(jax.checkpoint_policies.nothing_saveable) in (3 * (RING - 1), 4 * (RING - 1))
