"""What `ringjax info` says: versions, devices, and which attention backends can be used here."""

import importlib.metadata
import platform

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokamax", "libtpu")


def report() -> str:
    """Versions, devices and attention backends, as text."""
    return "\n".join([*_versions(), "", *_devices(), "", *_backends()])


def _versions() -> list[str]:
    import ringjax

    lines = [f"ringjax {ringjax.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [*lines, ", ".join(found)]


def _devices() -> list[str]:
    import jax

    from ringjax import accelerator
    from ringjax.training.utilisation import peak_flops

    devices = jax.devices()
    kinds = {device.device_kind for device in devices}
    lines = [f"devices: {len(devices)} × {', '.join(sorted(kinds))} ({devices[0].platform})"]
    memory = (devices[0].memory_stats() or {}).get("bytes_limit") if devices[0].platform != "cpu" else None
    peak = peak_flops(devices[0].device_kind)
    if memory:
        lines.append(f"  memory of one: {memory / 2**30:.1f} GiB usable")
    if peak:
        lines.append(f"  peak of one: {peak / 1e12:.0f} TFLOP/s (bfloat16, dense)")
    if devices[0].platform == "gpu":
        lines += [f"  {line}" for line in accelerator.said()]
    if devices[0].platform == "cpu":
        lines.append("  no accelerator; mesh.simulated_devices makes a mesh of CPU devices")
    return lines


def _backends() -> list[str]:
    from ringjax.attention import kernels

    lines = ["attention backends:"]
    for name, reason in kernels.available().items():
        lines.append(f"  {name:10s} {'available' if reason is None else f'not available: {reason}'}")
    return lines
