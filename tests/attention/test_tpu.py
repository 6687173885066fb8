"""The ring compiled for TPU slices: what its rotations hide behind, how often they run, what is copied and held.

Needs no TPU, but libtpu: pip install -e '.[tpu]'. The numbers are in docs/results/tpu_overlap.md.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ringjax as rj
from ringjax.planning import ahead, hlo

pytest.importorskip("libtpu", reason="libtpu is not installed (the extra 'tpu')")

SLICES = "v5e:2x4", "v5p:2x2x2", "v6e:2x4"
SLOTS, HEADS, KV_HEADS, HEAD_DIM = 8192, 32, 8, 128  # of one device
KV_ELEMENTS = SLOTS * KV_HEADS * HEAD_DIM
KV_BYTES = 2 * 2 * KV_ELEMENTS  # K and V of one shard in bfloat16
RING = 8


@functools.cache
def compiled(topology: str, backend: str, unroll: bool, backward: bool = True, slots: int = SLOTS):
    mesh = ahead.slice_mesh(topology)
    return ahead.ring_program(
        mesh, seq_len=slots * mesh.size, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, backward=backward,
        backend=backend, unroll=unroll,
    ).compile()  # fmt: skip


@functools.cache
def program(*case, **options) -> hlo.Program:
    return hlo.Program(compiled(*case, **options).as_text())


def behind_attention(transfer: hlo.Transfer) -> bool:
    return any("ring/attend" in line.scope for line in transfer.behind)


def test_forward_pass_for_v5e():
    """The quick one: R − 1 rotations, each of K and of V in bfloat16, each behind the kernel."""
    transfers = program("v5e:2x4", "splash", False, backward=False, slots=2048).transfers()
    assert collections.Counter(x.dtype for x in transfers for _ in range(x.times)) == {"bf16": 2 * (RING - 1)}
    assert all(line.is_kernel for x in transfers for line in x.behind) and all(map(behind_attention, transfers))


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "scan"])
@pytest.mark.parametrize("backend", ["splash", "xla"])
@pytest.mark.parametrize("topology", SLICES)
class TestForwardAndBackward:
    def test_every_rotation_is_behind_attention(self, topology, backend, unroll):
        """Between start and done lies attention: its Pallas kernel, or its loop. But the backward pass has a rotation
        more than hops: attention to a device's own keys hides the first of K and V or the way home of their gradients,
        as XLA likes, and the other is left to what comes before or after. It waits for nothing in this layer."""
        others = [x for x in program(topology, backend, unroll).transfers() if not behind_attention(x)]
        assert [x.times for x in others] in ([], [1, 1]) and len({x.dtype for x in others}) < 2

    def test_rotations(self, topology, backend, unroll):
        """Of K and V in bfloat16 R − 1 forward and R − 1 backward, of their gradients in float32 R − 1."""
        found = collections.Counter()
        for transfer in program(topology, backend, unroll).transfers():
            assert transfer.shape == (1, SLOTS, KV_HEADS, HEAD_DIM)
            found[transfer.dtype] += transfer.times
        assert found == {"bf16": 2 * 2 * (RING - 1), "f32": 2 * (RING - 1)}

    def test_copies_of_keys_and_values(self, topology, backend, unroll):
        """With `splash` unrolled hops copy nothing, and the loop of a scan once: what visits, for what arrives to lie
        there. `xla` also lays out K and V of each hop anew. At the start of a pass each may do it once."""
        copied = program(topology, backend, unroll).copied("bf16", {KV_ELEMENTS, 2 * KV_ELEMENTS}) / KV_BYTES
        a_hop = (0 if unroll else 1) + (0 if backend == "splash" else 3)
        assert copied <= 2 * (RING * a_hop + 4)

    def test_temporary_memory(self, topology, backend, unroll):
        """In shards of K and V, of which queries and what they carry are 4 (bfloat16) and 8 (float32) each."""
        temporary = compiled(topology, backend, unroll).memory_analysis().temp_size_in_bytes / KV_BYTES
        assert temporary <= (40 if backend == "splash" else 80), temporary


@pytest.mark.slow
def test_a_longer_ring_takes_no_more_memory_and_no_larger_program():
    """In scan form, with shards of the same size; so compile time does not grow with R either."""
    short, long = (compiled(topology, "splash", False) for topology in ("v5e:2x4", "v5e:4x4"))
    temporary = [x.memory_analysis().temp_size_in_bytes for x in (short, long)]
    lines = [len(x.as_text().splitlines()) for x in (short, long)]
    assert temporary[1] <= 1.03 * temporary[0] and lines[1] <= 1.03 * lines[0]
    rotations = sum(x.times for x in program("v5e:4x4", "splash", False).transfers())
    assert rotations == 2 * 3 * (16 - 1)


@pytest.mark.slow
@pytest.mark.parametrize("lengths, heads, head_dims, dtype, softcap", [
    ((2048, 2048), (4, 2), (64, 64), "bfloat16", None),
    ((2048, 2048), (4, 1), (256, 256), "bfloat16", 30.0),
    ((2048, 2048), (2, 2), (512, 512), "bfloat16", None),
    ((2048, 2048), (4, 2), (192, 128), "bfloat16", None),
    ((2048, 2048), (4, 2), (72, 40), "bfloat16", None),
    ((2048, 2048), (2, 1), (256, 256), "float32", 30.0),
    ((1000, 1700), (4, 2), (128, 128), "float32", None),
    ((2**18, 2**18), (1, 1), (128, 128), "bfloat16", None),
])  # fmt: skip
@pytest.mark.parametrize("topology", SLICES)
def test_what_splash_does_not_refuse_compiles(topology, lengths, heads, head_dims, dtype, softcap):
    """Forward and backward on one chip: vector and scalar memory suffice."""
    chip = Mesh(ahead.slice_mesh(topology).devices[:1], ("sp",))
    shapes = [(1, lengths[0], heads[0], head_dims[0])]
    shapes += [(1, lengths[1], heads[1], head_dim) for head_dim in head_dims]
    shapes += [(1, lengths[0], heads[0], head_dims[1])]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(chip, P())) for shape in shapes]
    local = functools.partial(rj.attention, backend="splash", softcap=softcap)
    attend = jax.shard_map(local, mesh=chip, in_specs=P(), out_specs=P())
    jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)).lower(*arrays).compile()


@functools.cache
def over_two_slices(strategy: str, backward: bool, slots: int = 2048, **options) -> list[hlo.Transfer]:
    """What two slices of 4 × 4 chips send each other by the data-center network."""
    mesh = ahead.slice_mesh("v5e:4x4:2")
    lowered = ahead.ring_program(
        mesh, seq_len=slots * mesh.size, heads=HEADS, kv_heads=KV_HEADS, backward=backward, backend="splash",
        strategy=strategy, **options,
    )  # fmt: skip
    return [x for x in hlo.Program(lowered.compile().as_text()).transfers() if x.across]


def test_a_two_level_ring_crosses_to_the_other_slice_once():
    """K and V, where the plain ring sends both in each of its 31 rotations; a turn around the own slice hides them.

    Which chips share a slice is seen on the mesh.
    """
    ring, double = (over_two_slices(strategy, backward=False) for strategy in ("ring", "two_level"))
    assert sum(x.times for x in ring) == 2 * 31
    assert sum(x.times for x in double) == 2 and all(x.hidden for x in double)
    assert len(over_two_slices("two_level", backward=False, host_size=16)) == 2


@pytest.mark.slow
def test_its_backward_pass_crosses_twice():
    """K and V once more, and once the sums of their gradients in float32."""
    ring, double = (over_two_slices(strategy, backward=True, slots=SLOTS) for strategy in ("ring", "two_level"))
    assert sum(x.times for x in ring) == 2 * 3 * 31
    assert collections.Counter(x.dtype for x in double for _ in range(x.times)) == {"bf16": 4, "f32": 2}
    assert all(x.hidden for x in double)
