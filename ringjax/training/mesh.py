"""The mesh `dp,fsdp,tp,sp`: four numbers, one of which may be -1 and takes the devices that are left.

    dp     copies of the model, each on other rows          fsdp   rows too, with the parameters cut over them
    tp     heads and feed-forward cut over devices           sp     the ring: the sequence cut over devices
"""

import logging
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from einops import rearrange
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ringjax.training.ring_order import ring_order

AXES = ("dp", "fsdp", "tp", "sp")

log = logging.getLogger(__name__)

# Eight simulated devices on two busy cores can wait for each other far longer than XLA's patience of 40 s, which ends
# the process.
_CPU_FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
)


def check_shape(shape: str) -> tuple[int, ...]:
    """The four numbers of a mesh string; raises ValueError for anything else."""
    parts = [part.strip() for part in shape.split(",")]
    if len(parts) != len(AXES) or not all(re.fullmatch(r"-1|[1-9][0-9]{0,5}", part) for part in parts):
        raise ValueError(
            f"mesh shape {shape!r} must be four numbers {','.join(AXES)}, each at least 1 or one of them -1,"
            " such as '1,-1,1,4'"
        )
    numbers = tuple(int(part) for part in parts)
    if numbers.count(-1) > 1:
        raise ValueError(f"mesh shape {shape!r} has {numbers.count(-1)} times -1; only one axis can be inferred")
    return numbers


def resolve_shape(shape: str, device_count: int) -> tuple[int, int, int, int]:
    """The mesh string with its -1 filled in; raises ValueError where it does not fit `device_count` devices."""
    numbers = check_shape(shape)
    known = math.prod(n for n in numbers if n != -1)
    named = " · ".join(f"{axis} {n}" for axis, n in zip(AXES, numbers) if n != -1)
    if known > device_count:
        raise ValueError(
            f"mesh shape {shape!r} asks for {known} devices ({named}) and there are {device_count}; "
            "ask for fewer, or simulate them on the CPU with mesh.simulated_devices"
        )
    if -1 in numbers:
        if device_count % known:
            raise ValueError(
                f"mesh shape {shape!r}: {device_count} devices cannot be divided by {known} ({named}) to infer"
                f" {AXES[numbers.index(-1)]}"
            )
        return tuple(device_count // known if n == -1 else n for n in numbers)
    if known != device_count:
        raise ValueError(
            f"mesh shape {shape!r} uses {known} of {device_count} devices ({named}); write one axis as -1 to use all"
        )
    return numbers


def make_mesh(shape: str, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `shape` over `devices` (default: all), with names dp, fsdp, tp, sp.

    Several TPU slices lie one after the other along the axes of `across_slices`. Raises ValueError where they cannot.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_shape(shape, len(devices))
    axis_types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "cpu":
        # make_mesh orders CPU devices as they come; written out, the rows of a process are always neighbours.
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=axis_types)
    slices = slices_of(devices)
    if len(slices) == 1:
        return Mesh(_inside(sizes, devices), AXES, axis_types=axis_types)
    across = across_slices(sizes, len(slices))
    parts = np.stack([_inside(tuple(n // m for n, m in zip(sizes, across)), part) for part in slices])
    whole = rearrange(
        parts.reshape(*across, *parts.shape[1:]), "d f t s dp fsdp tp sp -> (d dp) (f fsdp) (t tp) (s sp)"
    )
    return Mesh(whole, AXES, axis_types=axis_types)


def slices_of(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices by TPU slice; others are one group."""
    if devices[0].platform != "tpu":
        return [list(devices)]
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [groups[index] for index in sorted(groups)]


def across_slices(sizes: Sequence[int], slices: int) -> tuple[int, int, int, int]:
    """How many slices lie along each axis: dp first, which meets once a step, then fsdp, then sp, whose ring can hide
    the network (strategy two_level). Never tp, whose sums nothing hides. Raises ValueError where that leaves some."""
    found = _shared_out(sizes, slices)
    if math.prod(found) != slices:
        raise ValueError(
            f"mesh {','.join(map(str, sizes))} cannot be laid over {slices} TPU slices: dp, fsdp and sp must have the"
            f" factor {slices} among them, because tp stays inside a slice"
        )
    return found


def lies_over(sizes: Sequence[int], slices: int) -> bool:
    """Whether `across_slices` knows a way."""
    return math.prod(_shared_out(sizes, slices)) == slices


def _shared_out(sizes: Sequence[int], slices: int) -> tuple[int, int, int, int]:
    dp, fsdp, _, sp = sizes
    copies = math.gcd(dp, slices)
    rows = math.gcd(fsdp, slices // copies)
    return copies, rows, 1, math.gcd(sp, slices // copies // rows)


def _inside(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices of a slice, or of hosts of GPUs, as an array of these sizes; along sp they are neighbours."""
    try:
        found = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices).devices
    except NotImplementedError:  # an axis of a TPU slice must be cut in two: sp 512 and tp 2 on 8 × 8 × 16 chips
        found = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return _neighbours(found)


def _neighbours(devices: np.ndarray) -> np.ndarray:
    """The mesh with the chips of a TPU slice along sp in an order in which they are neighbours, where there is one."""
    if devices.flat[0].platform != "tpu":
        return devices
    order = ring_order(np.array([device.coords for device in devices[0, 0, 0]]))
    return devices if order is None else devices[..., order]


def simulate_devices(count: int) -> None:
    """Ask for `count` simulated CPU devices; call before JAX starts. Accelerators, where there are any, are used.

    Raises ValueError when JAX runs already with fewer devices.
    """
    if not count:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in _CPU_FLAGS if flag.split("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        have = len(jax.devices("cpu"))
        if have < count:
            raise ValueError(
                f"simulated_devices is {count}, but JAX runs already with {have} CPU devices; "
                "set it before the first use of JAX"
            ) from None


def is_simulated() -> bool:
    """Whether the devices in use are CPU devices."""
    return jax.devices()[0].platform == "cpu"
