"""Bytes: what a compiled program asks for, and what a device says was in use."""

from typing import Any

import jax


def compiled_memory(executable: Any) -> dict[str, int]:
    """Bytes of a compiled program on one device, from its own plan; empty where the compiler doesn't say.

    `temporary` is what it needs beside its arguments and results; `host_…` lies in the host's memory.
    """
    stats = executable.memory_analysis()
    if stats is None:
        return {}
    names = {
        "arguments": "argument_size_in_bytes",
        "results": "output_size_in_bytes",
        "aliased": "alias_size_in_bytes",
        "temporary": "temp_size_in_bytes",
        "program": "generated_code_size_in_bytes",
        "host_arguments": "host_argument_size_in_bytes",
        "host_results": "host_output_size_in_bytes",
        "host_temporary": "host_temp_size_in_bytes",
    }
    found = {name: getattr(stats, attribute, None) for name, attribute in names.items()}
    return {name: int(value) for name, value in found.items() if value is not None}


def peak_bytes() -> int | None:
    """The most bytes that any device of this process has had in use since it began; None where it isn't known."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def gib(count: float | None) -> str:
    """Bytes as GiB, or MiB where that is short: 1.2 GiB, 34 MiB."""
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
