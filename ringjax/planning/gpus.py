"""Compiling for several GPUs on a machine that has none of them: XLA needs their description, not the devices.

    mesh = gpu_mesh(8)
    compiled = ahead.ring_program(mesh, seq_len=131072, heads=32, kv_heads=8).compile()
    hlo.Program(compiled.as_text()).transfers()      # what each rotation is hidden behind

It needs JAX's CUDA plugin (`pip install ringjax[gpu]`), which loads where NVIDIA's driver is: one GPU of any kind, or
none in use. Products are not tuned for the device then, so times are not those of the real program; memory and the
order of the schedule are.
"""

import jax
import numpy as np
from jax.sharding import Mesh

# H100 SXM, as XLA describes its targets (xla/backends/gpu/target_config).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 19 patch: 0 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def gpu_mesh(count: int) -> Mesh:
    """`count` H100s of one host in a ring, along the mesh axis 'sp'.

    They are descriptions: programs can be compiled for them, not run. Raises NotImplementedError where JAX's CUDA
    plugin does not load.
    """
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology=f"1x1x{count}", target_config=H100
        )
    except (NotImplementedError, RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise NotImplementedError(
            f"compiling for GPUs needs JAX's CUDA plugin and NVIDIA's driver library, pip install 'ringjax[gpu]':"
            f" {str(error).splitlines()[0]}"
        ) from None
    return Mesh(np.array(found.devices), ("sp",))
