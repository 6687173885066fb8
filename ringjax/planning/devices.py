"""The devices that plans are made for: what their makers say, and which share of it programs reach.

| per device of JAX | bfloat16 FLOP/s, memory bytes/s | memory | links |
| --- | --- | --- | --- |
| TPU v4, v5e, v5p, v6e, 7x | `training.utilisation` | docs.cloud.google.com/tpu/docs/v4 … /tpu7x | the same |
| A100, H100, H200, B200 | `training.utilisation` | NVIDIA's data sheets (SXM) | NVLink 3, 4, 4, 5 |

`link` is what a device sends to ONE neighbour, one way. On a TPU that is the pages' "bidirectional interconnect per
chip" over two ways and over its ports (4 on v5e and v6e, 6 on v4, v5p and 7x); v4's is 50 GB/s a link and way (Jouppi
et al. 2023, arXiv:2304.01433). On a GPU it is half of NVLink's total. A TPU7x chip is two devices of JAX, so
everything is halved. `host_link` joins hosts of GPUs, one 400 Gb/s adapter a GPU (A100: 200), and slices of TPUs: the
pages' data-center network of a chip, or of a Pod over its chips (v5e 25 Gb/s, v5p 50, v6e 100; v4 and 7x, whose pages
do not say, are ASSUMED to have v5e's and v6e's).

`products` and `attention` are shares of the peak. For H100 they are fitted to docs/results/training.md; the same shares
are ASSUMED for the other GPUs, and `ASSUMED` ones for TPUs, on which nothing has been measured.
"""

import dataclasses
import difflib
import math
import re

from ringjax.accelerator import FRACTION
from ringjax.training.utilisation import peak_bandwidth, peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Rates:
    """Shares of a device's peak that a training step reaches.

    `attention` holds forward's and backward's at head size 128 on long rows; `ramp` tokens are what a shorter row
    loses, rate · T / (T + ramp); `exponent` is the cost of a pair beside its products, in units of head size. `memory`
    is the share of the memory's bandwidth that elementwise work reaches, `link` of a link's that a rotation does.
    """

    products: float
    attention: tuple[float, float]
    ramp: float = 1200.0
    exponent: float = 90.0
    memory: float = 1.0
    link: float = 0.6
    measured: bool = False


# Fitted to the twelve rows of docs/results/training.md (docs/results/planning.md says how well); the link is 268 of
# 450 GB/s, measured with ppermute.
H100_RATES = Rates(products=0.755, attention=(0.62, 0.525), measured=True)
ASSUMED_GPU = dataclasses.replace(H100_RATES, measured=False)
ASSUMED_TPU = Rates(products=0.75, attention=(0.5, 0.45), link=0.8)


@dataclasses.dataclass(frozen=True)
class Device:
    """One device of JAX. Bytes, and bytes a second."""

    name: str
    kind: str
    memory: float
    link: float
    host_link: float
    per_host: int | None
    """GPUs with fast links between them; None on TPUs, where the slice decides."""
    rates: Rates
    reserved: float = 0.0

    @property
    def platform(self) -> str:
        """'gpu' or 'tpu'."""
        return "tpu" if self.kind.startswith("TPU") else "gpu"

    @property
    def flops(self) -> float:
        """Peak bfloat16 operations a second."""
        return peak_flops(self.kind)

    @property
    def bandwidth(self) -> float:
        """Peak bytes a second of its memory."""
        return peak_bandwidth(self.kind)

    @property
    def usable(self) -> float:
        """What a program may use: on a TPU all but what XLA reserves, on a GPU what `ringjax.accelerator` asks for."""
        return self.memory - self.reserved if self.platform == "tpu" else self.memory * float(FRACTION)


def _tpu(name: str, kind: str, gib: float, usable: float, link: float, network: float) -> Device:
    # `usable` GiB are what libtpu 0.0.42 says is there when a program needs more; `network` is in Gb/s.
    return Device(name, kind, gib * GIB, link, network / 8 * 1e9, None, ASSUMED_TPU, reserved=(gib - usable) * GIB)


DEVICES = {
    device.name: device
    for device in (
        _tpu("v4", "TPU v4", 32, 30.75, 50e9, network=25),
        _tpu("v5e", "TPU v5 lite", 16, 15.75, 50e9, network=25),
        _tpu("v5p", "TPU v5p", 95.74, 95.74, 100e9, network=50),
        _tpu("v6e", "TPU v6 lite", 32, 31.25, 100e9, network=100),
        _tpu("tpu7x", "TPU7x", 96, 94.75, 50e9, network=50),
        # GPUs: what the driver shows of 80, 80, 141 and 180 GB.
        Device("a100", "NVIDIA A100-SXM4-80GB", 79.25 * GIB, 300e9, 25e9, 8, ASSUMED_GPU),
        Device("h100", "NVIDIA H100 80GB HBM3", 79.14 * GIB, 450e9, 50e9, 8, H100_RATES),
        Device("h200", "NVIDIA H200", 139.8 * GIB, 450e9, 50e9, 8, ASSUMED_GPU),
        Device("b200", "NVIDIA B200", 178.3 * GIB, 900e9, 50e9, 8, ASSUMED_GPU),
    )
}
DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
EXAMPLES = "'h100:8', 'h200:64', 'tpu:v5e:16x16', 'tpu:v5p:4x8x8' or two slices 'tpu:v5p:4x8x8:2'"


@dataclasses.dataclass(frozen=True)
class Target:
    """`count` devices; `topology` is the shape of a TPU slice in chips, None for GPUs, of which there are `slices`."""

    device: Device
    count: int
    topology: str | None = None
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Target":
        """A target such as 'h100:8', 'tpu:v5p:4x8x8' or 'tpu:v5p:4x8x8:2'; raises ValueError for anything else."""
        parts = text.lower().split(":")
        tpu, parts = parts[0] == "tpu", parts[1:] if parts[0] == "tpu" else parts
        device = _device(parts[0], text, tpu)
        is_tpu = device.platform == "tpu"
        if len(parts) > 2 + is_tpu or (len(parts) < 2 and is_tpu):
            raise ValueError(f"target {text!r} must be a device and how many there are, such as {EXAMPLES}")
        size = parts[1] if len(parts) >= 2 else "1"
        if device.platform == "gpu":
            if not re.fullmatch(r"[1-9][0-9]{0,5}", size):
                raise ValueError(f"target {text!r}: {size!r} is no number of GPUs; write one such as {EXAMPLES}")
            return cls(device, int(size))
        slices = parts[2] if len(parts) == 3 else "1"
        if not re.fullmatch(r"[1-9][0-9]{0,2}", slices):
            raise ValueError(f"target {text!r}: {slices!r} is no number of slices; write tpu:{device.name}:{size}:2")
        chips = _chips(size, device, text) * (2 if device.name == "tpu7x" else 1)
        return cls(device, chips * int(slices), size, int(slices))

    def __str__(self) -> str:
        return f"{self.device.name}:{self.count}" if self.topology is None else f"tpu:{self.libtpu}"

    @property
    def libtpu(self) -> str | None:
        """The name of the slice, or slices, for `ahead.slice_devices`."""
        if self.topology is None:
            return None
        return f"{self.device.name}:{self.topology}" + (f":{self.slices}" if self.slices > 1 else "")

    def link(self, across: bool) -> float:
        """Bytes a second from one device to the next, of the same host (TPU slice) or `across` to another."""
        return (self.device.host_link if across else self.device.link) * self.device.rates.link


def _device(name: str, text: str, tpu: bool) -> Device:
    found = DEVICES.get({"7x": "tpu7x", "v7x": "tpu7x"}.get(name, name))
    if found is None or (tpu and found.platform != "tpu"):
        near = difflib.get_close_matches(name, DEVICES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the devices are {', '.join(DEVICES)}"
        raise ValueError(f"target {text!r}: unknown device {name!r}; {hint}")
    return found


def _chips(size: str, device: Device, text: str) -> int:
    dimensions = DIMENSIONS[device.name]
    if not re.fullmatch(r"[1-9][0-9]{0,2}(x[1-9][0-9]{0,2})*", size) or size.count("x") + 1 != dimensions:
        shape = "4x8x8" if dimensions == 3 else "16x16"
        raise ValueError(
            f"target {text!r}: {size!r} is no shape of a {device.name} slice, which has {dimensions} dimensions;"
            f" write tpu:{device.name}:{shape}"
        )
    return math.prod(map(int, size.split("x")))
