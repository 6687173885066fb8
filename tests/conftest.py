"""All tests run on eight simulated CPU devices."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # lines of code in programs cost a tenth of the time
# Tests compile much and compute little: leave LLVM's costly passes out (the program that XLA makes is the same). And
# eight devices on two busy cores may wait for each other longer than the 40 s after which XLA ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
    " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
    # Without the newer emitters a ring compiles in 40 % of the time, a little less fused. jax 0.12 has no others.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""),
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
gc.set_threshold(50_000, 20, 20)  # tracing makes many small objects, and looking for cycles so often 7 % of the time


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Frees compiled programs before they are too many: each holds some memory maps, of which Linux gives a process
    65,530, and XLA's compiler crashes where it gets none."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 15_000:
        jax.clear_caches()
        gc.collect()
