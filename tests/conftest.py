"""All tests run on eight simulated CPU devices; run-time shape checks are on."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def devices():
    """The eight simulated devices."""
    return jax.devices()
