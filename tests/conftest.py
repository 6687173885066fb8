"""All tests run on eight simulated CPU devices; run-time shape checks are on."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: leave LLVM's costly passes out (the program that XLA makes is the same).
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def devices():
    """The eight simulated devices."""
    return jax.devices()
