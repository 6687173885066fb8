"""The other ways for queries to meet keys on other devices; they share the ring's layouts, reach and kernels."""

import dataclasses
from collections.abc import Sequence

import jax
from einops import rearrange, reduce, repeat
from jax import lax
from jaxtyping import Array

from ringjax.attention.kernels.base import Gradients, Kernels, Score
from ringjax.attention.merge import Partial
from ringjax.attention.ring import Ring
from ringjax.attention.two_level import TwoLevel
from ringjax.attention.vjp import Strategy

STRATEGIES = ("ring", "two_level", "all_gather", "ulysses", "hybrid")
# Those that treat the devices of a host unlike others.
BY_HOST = ("two_level", "hybrid")


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Every device gathers all of K and V and attends once: for short sequences and few devices.

    Its memory grows with the whole sequence. dK and dV are summed over the devices in float32.
    """

    ring: Ring

    def forward(self, kernels: Kernels, score: Score, q, k, v, start, stop) -> Partial:
        return self._alone().forward(kernels, score, q, self._gather(k), self._gather(v), start, stop)

    def backward(self, kernels: Kernels, score: Score, q, k, v, out, lse, dout, delta, start, stop) -> Gradients:
        k, v = self._gather(k), self._gather(v)
        grads = self._alone().backward(kernels, score, q, k, v, out, lse, dout, delta, start, stop)
        return Gradients(grads.dq, self._scatter(grads.dk), self._scatter(grads.dv))

    def _alone(self) -> Ring:
        # Under a causal mask the local queries are a part of the gathered positions.
        mask = None if self.ring.mask == "causal" else self.ring.mask
        return dataclasses.replace(self.ring, size=1, width=self.ring.size, offsets=(0,), mask=mask)

    def _gather(self, x: Array) -> Array:
        whole = lax.all_gather(x, self.ring.axis_name, axis=1, tiled=True)
        return self.ring.layout.restore(whole, self.ring.size, 1)

    def _scatter(self, x: Array) -> Array:
        permuted = self.ring.layout.permute(x, self.ring.size, 1)
        return lax.psum_scatter(permuted, self.ring.axis_name, scatter_dimension=1, tiled=True)


@dataclasses.dataclass(frozen=True)
class Ulysses:
    """Groups of `ring.width` devices trade sequence for heads, attend, and trade back (arXiv:2309.14509).

    Inside a group each device gets all of the group's tokens for its share of the heads; between groups K and V
    go around `ring`. One group is plain Ulysses; several are the hybrid of USP (arXiv:2405.07719). K/V heads
    fewer than the devices of a group are sent to each device that needs them.
    """

    ring: Ring

    def forward(self, kernels: Kernels, score: Score, q, k, v, start, stop) -> Partial:
        q, k, v = self._to_heads(q), self._to_heads(self._spread(k)), self._to_heads(self._spread(v))
        out, lse = self.ring.forward(kernels, score, q, k, v, self._gather(start), self._gather(stop))
        return Partial(self._to_sequence(out), self._rows_to_sequence(lse))

    def backward(self, kernels: Kernels, score: Score, q, k, v, out, lse, dout, delta, start, stop) -> Gradients:
        kv_heads = k.shape[2]
        q, out, dout = self._to_heads(q), self._to_heads(out), self._to_heads(dout)
        k, v = self._to_heads(self._spread(k)), self._to_heads(self._spread(v))
        lse, delta = self._rows_to_heads(lse), self._rows_to_heads(delta)
        start, stop = self._gather(start), self._gather(stop)
        grads = self.ring.backward(kernels, score, q, k, v, out, lse, dout, delta, start, stop)
        dq, dk, dv = (self._to_sequence(x) for x in grads)
        return Gradients(dq, self._collect(dk, kv_heads), self._collect(dv, kv_heads))

    def _to_heads(self, x: Array) -> Array:
        """`[B, C, N, H]` on each device of the group -> `[B, width·C, N / width, H]`, slots ascending."""
        return self.ring.layout.restore(self._trade(x, split=2, join=1), self.ring.width, 1)

    def _to_sequence(self, x: Array) -> Array:
        return self._trade(self.ring.layout.permute(x, self.ring.width, 1), split=1, join=2)

    def _rows_to_heads(self, x: Array) -> Array:
        return rearrange(self._to_heads(rearrange(x, "b n t -> b t n 1")), "b t n 1 -> b n t")

    def _rows_to_sequence(self, x: Array) -> Array:
        return rearrange(self._to_sequence(rearrange(x, "b n t -> b t n 1")), "b t n 1 -> b n t")

    def _trade(self, x: Array, split: int, join: int) -> Array:
        return lax.all_to_all(
            x, self.ring.axis_name, split_axis=split, concat_axis=join, tiled=True, axis_index_groups=self._groups()
        )

    def _gather(self, x: Array) -> Array:
        whole = lax.all_gather(x, self.ring.axis_name, axis=1, tiled=True, axis_index_groups=self._groups())
        return self.ring.layout.restore(whole, self.ring.width, 1)

    def _groups(self) -> list[list[int]] | None:
        if self.ring.size == 1:
            return None
        return [[g * self.ring.width + i for i in range(self.ring.width)] for g in range(self.ring.size)]

    def _spread(self, x: Array) -> Array:
        return repeat(x, "b s k h -> b s (k copies) h", copies=max(1, self.ring.width // x.shape[2]))

    def _collect(self, x: Array, kv_heads: int) -> Array:
        return reduce(x, "b s (k copies) h -> b s k h", "sum", k=kv_heads)


def check_name(strategy: str) -> None:
    """Raises ValueError for a strategy that does not exist."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; the strategies are {', '.join(map(repr, STRATEGIES))}")


def check_host_size(strategy: str, host_size: int | None) -> None:
    """Raises ValueError for a `host_size` that is no number of devices, or that the strategy has no use for."""
    if host_size is None:
        return
    if strategy not in BY_HOST:
        raise ValueError(
            f"host_size {host_size} means nothing to strategy {strategy!r}; leave it out, or use 'two_level', 'hybrid'"
        )
    if isinstance(host_size, bool) or not isinstance(host_size, int) or host_size < 1:
        raise ValueError(f"host_size {host_size!r} must be a number of devices, at least 1")


def get(strategy: str, ring: Ring, host_size: int | None = None, unroll: bool | None = None) -> Strategy:
    """The strategy called `strategy`, over `ring`; `host_size` and `unroll` as in `ring_attention`."""
    check_name(strategy)
    if strategy == "ring":
        return ring
    if strategy == "two_level":
        return TwoLevel.of(ring, _inside(host_size, ring.size), unroll)
    return AllGather(ring) if strategy == "all_gather" else Ulysses(ring)


def check_hosts(strategy: str, host_size: int | None, devices: int) -> None:
    """Raises ValueError for a `host_size` into which a two-level ring of so many devices cannot be cut."""
    if strategy == "two_level" and host_size is not None and devices % min(devices, host_size):
        raise ValueError(
            f"a ring of {devices} devices cannot be cut into hosts of {host_size}; give a host_size that divides"
            f" {devices}, or use strategy 'ring'"
        )


def _inside(host_size: int | None, devices: int) -> int:
    """Neighbours in the ring with fast links between them."""
    inside = min(devices, _host_size("two_level", host_size))
    check_hosts("two_level", inside, devices)
    return inside


def in_slice(devices: Sequence[jax.Device]) -> int | None:
    """How many of the devices, those of a ring or all, are in each TPU slice; None where they are no TPUs.

    A slice has one network for all of its hosts; what joins slices is as slow as what joins hosts elsewhere.
    """
    if devices[0].platform != "tpu":
        return None
    return len(devices) // len({getattr(device, "slice_index", 0) for device in devices})


def _host_size(strategy: str, host_size: int | None) -> int:
    if host_size is not None:
        return host_size
    if (found := in_slice(jax.devices())) is not None:
        return found
    if jax.local_device_count() == 1 < jax.process_count():
        raise ValueError(
            f"strategy {strategy!r} goes by hosts, and each process has one device: say how many devices share a host"
            " with host_size (mesh.host_size), or use 'ring'"
        )
    return jax.local_device_count()


def width(
    strategy: str, ulysses_size: int | None, heads: int, kv_heads: int, devices: int, host_size: int | None = None
) -> int:
    """How many neighbouring devices trade heads for sequence: 1 without Ulysses.

    'hybrid' without a `ulysses_size` takes the largest that fits, at most `host_size` (None: the devices of this
    process). Raises ValueError for a size that means nothing, NotImplementedError where the heads cannot be split.
    """
    check_host_size(strategy, host_size)
    if None not in (ulysses_size, host_size):
        raise ValueError(f"ulysses_size {ulysses_size} and host_size {host_size} both say how devices group; give one")
    if strategy in ("ring", "two_level", "all_gather"):
        if ulysses_size is not None:
            raise ValueError(f"ulysses_size {ulysses_size} means nothing to strategy {strategy!r}; use 'hybrid'")
        return 1
    if strategy == "ulysses":
        if ulysses_size not in (None, devices):
            raise ValueError(f"ulysses_size {ulysses_size} with strategy 'ulysses' on {devices} devices; use 'hybrid'")
        size = devices
    elif ulysses_size is None:
        size = widest(heads, kv_heads, devices, most=_host_size(strategy, host_size))
    elif ulysses_size < 1 or devices % ulysses_size:
        raise ValueError(f"ulysses_size {ulysses_size} does not divide the {devices} devices of the ring")
    else:
        size = ulysses_size
    if not splits(heads, kv_heads, size):
        raise NotImplementedError(
            f"ulysses over {size} devices cannot split {heads} query and {kv_heads} key/value heads a device evenly; "
            "use strategy='ring', or 'hybrid' with a ulysses_size that divides both"
        )
    return size


def splits(heads: int, kv_heads: int, size: int) -> bool:
    """Whether Ulysses over `size` devices can share so many query and key/value heads out evenly."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def widest(heads: int, kv_heads: int, devices: int, most: int) -> int:
    """The largest group of at most `most` devices that divides `devices` and the heads."""
    sizes = range(min(devices, most), 0, -1)
    return next(size for size in sizes if devices % size == 0 and splits(heads, kv_heads, size))
