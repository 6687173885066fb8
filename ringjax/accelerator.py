"""What the command line sets for GPUs before JAX starts. What the user has set stays as it is.

JAX leaves a quarter of a GPU's memory alone unless told otherwise, for programs that share it; a training run has it
to itself. XLA's scheduler that hides collectives behind compute is on by default, so no flag is set for it: in the
program that jax 0.11.2 compiles for a training step on two GPUs, every rotation of the ring has compute inside.
"""

import os

SETTINGS = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94"}
_ALSO = "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_CLIENT_MEM_FRACTION"

_set: dict[str, str] = {}


def prepare() -> None:
    """Set what is not set; call before JAX's first use. It changes nothing on other devices."""
    if any(name in os.environ for name in (*SETTINGS, *_ALSO)):
        return  # the user manages the memory
    for name, value in SETTINGS.items():
        os.environ[name] = _set[name] = value


def said() -> list[str]:
    """For people: what was set and by whom, a line each."""
    lines = []
    for name in SETTINGS:
        value = os.environ.get(name)
        who = "set by ringjax" if name in _set else "not set" if value is None else "yours"
        lines.append(f"{name}={value} ({who})" if value is not None else f"{name}: {who}")
    return lines
