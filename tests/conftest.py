"""All tests run on eight simulated CPU devices."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: leave LLVM's costly passes out (the program that XLA makes is the same). And
# eight devices on two busy cores may wait for each other longer than the 40 s after which XLA ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
    " --xla_cpu_collective_call_terminate_timeout_seconds=1200",
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
