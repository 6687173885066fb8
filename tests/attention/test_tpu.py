"""The ring compiled ahead of time for eight TPU v5e chips; needs no TPU, but libtpu: pip install -e '.[tpu]'."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ringjax as rj

pytest.importorskip("libtpu", reason="libtpu is not installed (the extra 'tpu')")

QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "scan"])
def test_ring_compiles_for_tpu(unroll):
    """Forward and backward: R − 1, R − 1 and R rotations (in scan form one a loop, and those of the first and last
    hops). K and V travel in bfloat16, the sums of gradients in float32; XLA rounds those to the type of K before
    their last transfer rather than after it, which gives the same numbers."""
    from jax.experimental import topologies

    os.environ.update(QUIET)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = jax.sharding.Mesh(np.array(topology.devices).reshape(8), ("sp",))
    place = NamedSharding(mesh, PartitionSpec(None, "sp"))
    q, k = (jax.ShapeDtypeStruct((1, 65536, n, 128), jnp.bfloat16, sharding=place) for n in (16, 8))

    def both(q, k, v, dout):
        return jax.vjp(lambda *a: rj.sharded_attention(*a, mesh=mesh, unroll=unroll), q, k, v)[1](dout)

    text = jax.jit(both).lower(q, k, k, q).compile().as_text()
    wires = re.findall(r"= \((\w+)\[[^=]*collective-permute-start\(", text)
    assert sorted(wires) == ["bf16"] * (15 if unroll else 4) + ["f32"] * (7 if unroll else 2)
