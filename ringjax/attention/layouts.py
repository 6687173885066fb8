"""Layouts: which global index sits in which slot of which shard.

In every layout the slots of a shard are in ascending global order, so an interval of global indices is
one interval of slots. With R shards of C slots each:

    contiguous, R=4:  shard 0 | 0  1  2  3       striped, R=4:  shard 0 | 0  4  8 12
                      shard 1 | 4  5  6  7                      shard 1 | 1  5  9 13
                      shard 2 | 8  9 10 11                      shard 2 | 2  6 10 14
                      shard 3 | 12 13 14 15                     shard 3 | 3  7 11 15

    zigzag, R=4, 2R chunks of C/2:  shard 0 | 0 1 14 15
                                    shard 1 | 2 3 12 13
                                    shard 2 | 4 5 10 11
                                    shard 3 | 6 7  8  9

Under a causal mask the contiguous layout leaves half of the machine idle: the last shard has work in all R
hops while the first has it in one. Striped (Brandon et al. 2023, arXiv:2311.09431) and zigzag give every
shard the same work in every hop.
"""

import difflib
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from ringjax.attention import patterns


class Layout:
    """A layout is two functions, `slots` and `slots_below`, and the permutation that they describe."""

    name: ClassVar[str]
    # Whether the tokens of neighbouring shards, put in ascending order, are a shard of a smaller ring of this layout.
    groups_stay_in_order: ClassVar[bool] = True

    def slots(self, shard, ring_size: int, length: int) -> Int[Array, " C"]:
        """The global index of each of the `length` slots of `shard`, ascending."""
        raise NotImplementedError

    def slots_below(self, x: Int[Array, "..."], shard, ring_size: int, length: int) -> Int[Array, "..."]:
        """How many of the `length` slots of `shard` hold a global index below `x` (any integers, any shape)."""
        raise NotImplementedError

    def permute(self, x, ring_size: int, axis: int = 1):
        """The global array `x` in layout order along `axis`: shard 0's slots first, then shard 1's, …"""
        raise NotImplementedError

    def restore(self, x, ring_size: int, axis: int = 1):
        """The inverse of `permute`: layout order back to ascending global order."""
        raise NotImplementedError

    def offsets(self, behind: int, ahead: int, ring_size: int, length: int) -> list[int]:
        """The d in `source = shard − d (mod R)` whose keys some query may see, if none sees further than
        `behind` tokens back and `ahead` tokens on."""
        raise NotImplementedError

    def causal_patterns(self, length: int) -> patterns.Patterns:
        """What the queries of a shard of `length` slots see of an earlier, their own and a later shard."""
        raise NotImplementedError

    def multiple(self, ring_size: int) -> int:
        """Sequence lengths must be divisible by this."""
        return ring_size

    def validate(self, seq_len: int, ring_size: int) -> None:
        """Raises ValueError when `seq_len` cannot be cut for a ring of `ring_size`."""
        pieces = self.multiple(ring_size)
        if seq_len % pieces:
            padded = math.ceil(seq_len / pieces) * pieces
            what = f"{pieces} shards" if pieces == ring_size else f"2·sp = {pieces} chunks"
            other = "" if seq_len % ring_size or pieces == ring_size else " or use 'striped'"
            raise ValueError(
                f"seq_len {seq_len} cannot be cut into {what} for layout {self.name!r}; pad to {padded}{other}"
            )


class Contiguous(Layout):
    """Shard d holds d·C … d·C+C−1: one piece of the sequence."""

    name = "contiguous"

    def slots(self, shard, ring_size: int, length: int):
        return shard * length + jnp.arange(length, dtype=jnp.int32)

    def slots_below(self, x, shard, ring_size: int, length: int):
        return jnp.clip(x - shard * length, 0, length)

    def permute(self, x, ring_size: int, axis: int = 1):
        self.validate(x.shape[axis], ring_size)
        return x

    restore = permute

    def offsets(self, behind: int, ahead: int, ring_size: int, length: int) -> list[int]:
        back, on = math.ceil(behind / length), math.ceil(ahead / length)
        return sorted({d % ring_size for d in range(-min(on, ring_size), min(back, ring_size) + 1)})

    def causal_patterns(self, length: int) -> patterns.Patterns:
        return patterns.Patterns(patterns.whole(length, length), patterns.causal(length), None)


class Striped(Layout):
    """Shard d holds d, d+R, d+2R, …: every R-th token (arXiv:2311.09431)."""

    name = "striped"
    groups_stay_in_order = False

    def slots(self, shard, ring_size: int, length: int):
        return shard + ring_size * jnp.arange(length, dtype=jnp.int32)

    def slots_below(self, x, shard, ring_size: int, length: int):
        return jnp.clip(-((shard - x) // ring_size), 0, length)  # ceil((x − d) / R) without a float

    def permute(self, x, ring_size: int, axis: int = 1):
        self.validate(x.shape[axis], ring_size)
        return _rearrange(x, axis, "(c r) -> (r c)", r=ring_size)

    def restore(self, x, ring_size: int, axis: int = 1):
        self.validate(x.shape[axis], ring_size)
        return _rearrange(x, axis, "(r c) -> (c r)", r=ring_size)

    def offsets(self, behind: int, ahead: int, ring_size: int, length: int) -> list[int]:
        return sorted({d % ring_size for d in range(-min(ahead, ring_size), min(behind, ring_size) + 1)})

    def causal_patterns(self, length: int) -> patterns.Patterns:
        causal = patterns.causal(length)
        return patterns.Patterns(causal, causal, patterns.strictly_causal(length))


class Zigzag(Layout):
    """Shard d holds chunks d and 2R−1−d of 2R: an early piece and a late one."""

    name = "zigzag"

    def slots(self, shard, ring_size: int, length: int):
        chunk = length // 2
        early, late = shard * chunk, (2 * ring_size - 1 - shard) * chunk
        i = jnp.arange(length, dtype=jnp.int32)
        return jnp.where(i < chunk, early + i, late + i - chunk)

    def slots_below(self, x, shard, ring_size: int, length: int):
        chunk = length // 2
        early, late = shard * chunk, (2 * ring_size - 1 - shard) * chunk
        return jnp.clip(x - early, 0, chunk) + jnp.clip(x - late, 0, chunk)

    def permute(self, x, ring_size: int, axis: int = 1):
        self.validate(x.shape[axis], ring_size)
        halves = _rearrange(x, axis, "(two r c) -> two r c", two=2, r=ring_size)
        return rearrange(_turn_second(halves, axis % x.ndim), _along(x.ndim, axis % x.ndim, "two r c -> (r two c)"))

    def restore(self, x, ring_size: int, axis: int = 1):
        self.validate(x.shape[axis], ring_size)
        halves = _rearrange(x, axis, "(r two c) -> two r c", two=2, r=ring_size)
        return rearrange(_turn_second(halves, axis % x.ndim), _along(x.ndim, axis % x.ndim, "two r c -> (two r c)"))

    def offsets(self, behind: int, ahead: int, ring_size: int, length: int) -> list[int]:
        chunks = min(math.ceil(max(behind, ahead) / (length // 2)), ring_size)
        return sorted({d % ring_size for d in range(-chunks, chunks + 1)})

    def causal_patterns(self, length: int) -> patterns.Patterns:
        half = length // 2
        return patterns.Patterns(
            patterns.whole(length, half),
            patterns.causal(length),
            patterns.Pattern((half, length), (0, length), causal=False),
        )

    def multiple(self, ring_size: int) -> int:
        return 2 * ring_size


def get(name: "str | Layout") -> Layout:
    """The layout called `name`: 'contiguous', 'striped' or 'zigzag'. Raises ValueError for another name."""
    if isinstance(name, Layout):
        return name
    if name not in LAYOUTS:
        near = difflib.get_close_matches(str(name), LAYOUTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown layout {name!r}; the layouts are {', '.join(map(repr, LAYOUTS))}{hint}")
    return LAYOUTS[name]


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Contiguous(), Striped(), Zigzag())}


def _rearrange(x, axis: int, pattern: str, **sizes: int):
    """The einops `pattern` of one axis, applied to `axis` of `x` and leaving the others alone."""
    axis %= x.ndim
    return rearrange(_whole(x, axis), _along(x.ndim, axis, pattern), **sizes)


def _along(ndim: int, axis: int, pattern: str) -> str:
    before, after = (" ".join(f"{side}{i}" for i in range(n)) for side, n in (("a", axis), ("z", ndim - axis - 1)))
    left, right = pattern.split("->")
    return f"{before} {left.strip()} {after} -> {before} {right.strip()} {after}"


def _whole(x, axis: int):
    """`x` with `axis` on every device where its type says that it is sharded (explicit mesh axes): a sharded
    axis cannot be reshaped then, and a permutation of the whole sequence moves it anyway."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else None
    if sharding is None or len(sharding.spec) <= axis or sharding.spec[axis] is None:
        return x
    spec = sharding.spec
    return jax.reshard(x, NamedSharding(sharding.mesh, P(*spec[:axis], None, *spec[axis + 1 :])))


def _turn_second(halves, axis: int):
    """Reverses the order of the chunks in the second half; `halves` has axes (…, two, r, c, …) from `axis`."""
    xp = np if isinstance(halves, np.ndarray) else jnp
    first, second = (xp.take(halves, i, axis=axis) for i in (0, 1))
    return xp.stack([first, xp.flip(second, axis=axis)], axis=axis)
