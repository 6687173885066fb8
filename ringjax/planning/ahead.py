"""Compiling for a TPU slice on a machine without one: needs libtpu (`pip install ringjax[tpu]`), not a TPU.

    mesh = slice_mesh("v5e:2x4")
    compiled = ring_program(mesh, seq_len=65536, heads=16, kv_heads=8).compile()
    compiled.memory_analysis()                       # bytes on each chip
    hlo.Program(compiled.as_text()).transfers()      # what each rotation is hidden behind

    training_program(stage, slice_devices("v4:8x8x16")).compile()     # the step of `ringjax train`, for 1024 chips
"""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ringjax as rj
from ringjax.data.packing import empty_batch
from ringjax.models.parallel import Parallel
from ringjax.training.config import StageConfig
from ringjax.training.distributed import BATCH_SPEC
from ringjax.training.mesh import make_mesh
from ringjax.training.step import make_trainer

# libtpu otherwise looks for a TPU's metadata, which takes minutes to fail, and locks out other processes.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
# A v4 chip has two cores; joined into one they are one device, as on real slices.
MEGACORE = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}


def slice_devices(topology: str) -> list:
    """The chips of a slice such as 'v4:4x4x4', 'v5e:2x4', 'v5p:2x2x2', 'v6e:2x4' or 'tpu7x:2x2x1' (two devices a chip),
    or of several slices joined by the data-center network: 'v5e:16x16:2'.

    They are descriptions: programs can be compiled for them, not run. Raises ModuleNotFoundError without libtpu,
    ValueError for a slice that does not exist.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for TPU needs libtpu; pip install 'ringjax[tpu]'", name="libtpu")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options = MEGACORE if topology.startswith("v4:") else {}
    if several := re.fullmatch(r"(.*x.*):([1-9][0-9]{0,2})", topology):
        topology, options = several[1], options | {"num_slices": int(several[2])}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no TPU slice {topology!r}: {reason}; use one such as 'v5e:2x4' or 'v5p:2x2x2'") from None


def slice_mesh(topology: str) -> Mesh:
    """The chips of one or several slices in a ring, along the mesh axis 'sp'; raises as `slice_devices`."""
    devices = slice_devices(topology)
    return Mesh(make_mesh(f"1,1,1,{len(devices)}", devices).devices.ravel(), ("sp",))


def training_program(stage: StageConfig, devices: list, steps: int | None = None) -> jax.stages.Lowered:
    """The step of `ringjax train` for a stage on `devices`, which may be descriptions, ready to `.compile()`."""
    mesh = make_mesh(stage.mesh.shape, devices)
    asked = stage.mesh
    parallel = Parallel(mesh, asked.layout, asked.strategy, asked.backend, host_size=asked.host_size)
    training = stage.training
    trainer = make_trainer(stage.model, stage.optimizer, parallel, steps=steps or training.steps, start=0)
    rows = training.batch_size // training.accumulation
    place, shape = NamedSharding(mesh, BATCH_SPEC), (training.accumulation, rows, training.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, x.dtype, sharding=place) for name, x in empty_batch(1, 1).items()}
    return trainer.step.lower(trainer.abstract, batch)


def ring_program(
    mesh: Mesh, *, seq_len: int, heads: int, kv_heads: int, head_dim: int = 128, batch: int = 1, dtype="bfloat16",
    backward: bool = False, **options,
) -> jax.stages.Lowered:  # fmt: skip
    """Ring attention over `mesh` and the projection of its output, ready to `.compile()`: the forward pass, or with
    `backward` that and the gradients. `options` are those of `rj.sharded_attention`.

    The projection is there because attention is never alone: the first rotation of the backward pass needs no gradient,
    so it hides behind what comes before.
    """

    def array(spec: P, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    tokens, width = P(None, "sp"), heads * head_dim
    q, k = (array(tokens, batch, seq_len, n, head_dim) for n in (heads, kv_heads))
    weights, stream = array(P(), heads, head_dim, width), array(tokens, batch, seq_len, width)

    def layer(q, k, v, weights):
        return jnp.einsum("btnh,nhd->btd", rj.sharded_attention(q, k, v, mesh=mesh, **options), weights)

    def layer_and_gradients(q, k, v, weights, dout):
        out, pull = jax.vjp(layer, q, k, v, weights)
        return out, *pull(dout)

    if backward:
        return jax.jit(layer_and_gradients).lower(q, k, k, weights, stream)
    return jax.jit(layer).lower(q, k, k, weights)
