"""What is set for GPUs, and what the user has set."""

import pytest

from ringjax import accelerator


@pytest.fixture
def clean(monkeypatch):
    for name in (*accelerator.SETTINGS, *accelerator._ALSO):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerator, "_set", {})
    return monkeypatch


def test_sets_what_is_not_set_and_says_so(clean):
    clean.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "x")  # so that monkeypatch restores it
    clean.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert accelerator.said() == ["XLA_PYTHON_CLIENT_MEM_FRACTION: not set"]
    accelerator.prepare()
    assert accelerator.said() == ["XLA_PYTHON_CLIENT_MEM_FRACTION=0.94 (set by ringjax)"]


@pytest.mark.parametrize("name", [*accelerator.SETTINGS, *accelerator._ALSO])
def test_the_users_own_settings_stay(clean, name):
    clean.setenv(name, "0.5")
    accelerator.prepare()
    assert not accelerator._set
    expected = "=0.5 (yours)" if name in accelerator.SETTINGS else ": not set"
    assert accelerator.said() == [f"XLA_PYTHON_CLIENT_MEM_FRACTION{expected}"]
