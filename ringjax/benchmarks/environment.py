"""What a number was measured on: hardware, versions, flags and the command."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from typing import Any

import jax

_PACKAGES = (
    "ringjax", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
    "nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-cublas", "tokamax", "libtpu", "ringattention", "torch", "numpy",
)  # fmt: skip
_SMI = ("driver_version", "memory.total", "clocks.max.sm", "power.limit")
# Settings that change the numbers.
_VARIABLES = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB",
)  # fmt: skip


def describe(arguments: list[str]) -> dict[str, Any]:
    """Everything worth knowing about this process; `arguments` are those of `ringjax`."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(["ringjax", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "platform": device.platform,
        "platform_version": getattr(device.client, "platform_version", ""),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "variables": {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
        "nvidia_smi": nvidia_smi() if device.platform == "gpu" else None,
    }


def versions() -> dict[str, str]:
    """Of the packages that have a say in the numbers, those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def nvidia_smi() -> dict[str, str] | None:
    """Driver, memory, clock and power limit of the first GPU; None where the program is missing or says nothing."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in (text.splitlines() or [""])[0].split(",")]
    return dict(zip(_SMI, values)) if len(values) == len(_SMI) else None


def header(found: dict[str, Any]) -> list[str]:
    """The environment in a few lines, for the top of a table."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "numpy")
    lines = [
        f"{found['devices']} × {found['device']} ({found['platform']}), Python {found['python']}, {versions}",
        *(f"{name}={value}" for name, value in found["variables"].items()),
    ]
    if smi := found["nvidia_smi"]:
        lines.insert(1, f"driver {smi['driver_version']}, {smi['clocks.max.sm']} at most, {smi['power.limit']}")
    if found["platform"] == "cpu":
        lines.append("CPU devices: these times say nothing about an accelerator")
    return lines
