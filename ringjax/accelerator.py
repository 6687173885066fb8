"""What the command line sets for GPUs before JAX starts. What the user has set stays as it is.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.94
        JAX leaves a quarter of a GPU's memory alone otherwise, for programs that share it; a training run has it to
        itself.
    XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=nine tenths of the host's memory
        XLA takes at most 64 GB of it otherwise, and what `remat: offload` keeps there grows with the context.
    XLA_FLAGS --xla_gpu_experimental_parallel_collective_overlap_limit=4
        XLA lets one collective run beside the compute, and waits for every other one that is due meanwhile. A ring's
        backward pass has two under way, K and V and the sums of their gradients (docs/results/gpu_overlap.md).
    XLA_FLAGS --xla_gpu_collective_permute_combine_threshold_bytes=8589934592
        K and V in one message. Of two, the second starts when the attention that should hide it has taken the whole
        GPU already, and ends after it (docs/results/gpu_overlap.md).

XLA's scheduler that hides collectives behind compute is on by default. In a program of your own call `prepare` before
the first use of JAX.
"""

import importlib.metadata
import os

MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
FRACTION = "0.94"
HOST_MEMORY = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_OTHER_MEMORY = "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_CLIENT_MEM_FRACTION"
OVERLAP = "--xla_gpu_experimental_parallel_collective_overlap_limit"
COMBINE = "--xla_gpu_collective_permute_combine_threshold_bytes"
FLAGS = {OVERLAP: 4, COMBINE: 8 * 2**30}
# XLA ends the process at a flag that it doesn't know; these were tried with jaxlib 0.10.2, 0.11.2 and 0.12.0.
_KNOWS_FLAGS = (0, 10, 2), (0, 13)

_set: set[str] = set()


def prepare() -> None:
    """Set what is not set; call before JAX's first use. It changes nothing on other devices."""
    if not any(name in os.environ for name in (MEMORY, *_OTHER_MEMORY)):  # else the user manages the memory
        os.environ[MEMORY] = FRACTION
        _set.add(MEMORY)
    if HOST_MEMORY not in os.environ:
        os.environ[HOST_MEMORY] = str(_host_memory_limit())
        _set.add(HOST_MEMORY)
    if not _jaxlib_knows_flags():
        return
    for name, value in FLAGS.items():
        flags = os.environ.get("XLA_FLAGS", "")
        if name not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {name}={value}".strip()
            _set.add(name)


def said() -> list[str]:
    """For people: what was set and by whom, a line each."""
    memory = [_said(name, os.environ.get(name)) for name in (MEMORY, HOST_MEMORY)]
    return [*memory, *(_said(name, _flag(name)) for name in FLAGS)]


def _host_memory_limit() -> int:
    """GB (2^30 bytes)."""
    return max(1, int(0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30))


def _flag(name: str) -> str | None:
    found = next((flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.startswith(name)), None)
    return None if found is None else found.partition("=")[2]


def _said(name: str, value: str | None) -> str:
    if value is None:
        return f"{name}: not set"
    return f"{name}={value} ({'set by ringjax' if name in _set else 'yours'})"


def _jaxlib_knows_flags() -> bool:
    first, beyond = _KNOWS_FLAGS
    digits = importlib.metadata.version("jaxlib").split(".")[:3]
    return all(part.isdigit() for part in digits) and first <= tuple(map(int, digits)) < beyond
