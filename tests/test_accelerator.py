"""What is set for GPUs, and what the user has set."""

import os
import subprocess
import sys

import pytest

from ringjax import accelerator
from ringjax.accelerator import COMBINE, HOST_MEMORY, MEMORY, OVERLAP


@pytest.fixture
def clean(monkeypatch):
    for name in (MEMORY, HOST_MEMORY, *accelerator._OTHER_MEMORY, "XLA_FLAGS"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(accelerator, "_set", set())
    monkeypatch.setattr(accelerator, "_host_memory_limit", lambda: 115)
    return monkeypatch


def test_sets_what_is_not_set_and_says_so(clean):
    assert accelerator.said() == [f"{name}: not set" for name in (MEMORY, HOST_MEMORY, OVERLAP, COMBINE)]
    clean.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    accelerator.prepare()
    settings = f"{MEMORY}=0.94", f"{HOST_MEMORY}=115", f"{OVERLAP}=4", f"{COMBINE}=8589934592"
    assert accelerator.said() == [f"{setting} (set by ringjax)" for setting in settings]
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_autotune_level=0 {settings[2]} {settings[3]}"


@pytest.mark.parametrize("name", [MEMORY, *accelerator._OTHER_MEMORY])
def test_the_users_own_settings_stay(clean, name):
    clean.setenv(name, "0.5")
    clean.setenv(HOST_MEMORY, "7")
    clean.setenv("XLA_FLAGS", f"{OVERLAP}=2 {COMBINE}=1")
    accelerator.prepare()
    assert not accelerator._set and os.environ["XLA_FLAGS"] == f"{OVERLAP}=2 {COMBINE}=1"
    memory = f"{MEMORY}=0.5 (yours)" if name == MEMORY else f"{MEMORY}: not set"
    assert accelerator.said() == [memory, f"{HOST_MEMORY}=7 (yours)", f"{OVERLAP}=2 (yours)", f"{COMBINE}=1 (yours)"]


def test_a_jaxlib_that_was_not_tried_gets_no_flags(clean):
    clean.setattr(accelerator.importlib.metadata, "version", lambda name: "0.13.0")
    accelerator.prepare()
    assert "XLA_FLAGS" not in os.environ


def test_xla_knows_the_flags(clean):
    """It would end the process if it did not know one."""
    accelerator.prepare()
    code = "import jax; jax.config.update('jax_platforms', 'cpu'); print(jax.jit(lambda x: x + 1)(1))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "2"


def test_the_host_memory_limit_is_most_of_what_there_is():
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert whole * 0.9 - 1 <= accelerator._host_memory_limit() <= max(1, whole)
