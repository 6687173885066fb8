"""What is computed: the mask, the useful FLOPs, and the inputs, whatever devices compute it.

A mask is drawn for each row of the batch, T tokens a row:

    causal     query t sees the keys 0 … t                              T(T + 1)/2 pairs
    full       every query sees every key                               T²
    window:W   the last W of those                                      about T·W
    packed     those of its own document; lengths are log-normal (σ = 1), the last document is cut at the end of the row

Useful FLOPs are counted from the visible (query, key) pairs, forward 4 · pairs · N · H (two products), backward 2.5
times that (five products).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

import ringjax as rj

# Spread of the documents' lengths: as wide as natural text, most are short and a few hold most of the tokens.
SIGMA = 1.0
BACKWARD = 2.5


@dataclasses.dataclass(frozen=True)
class Workload:
    """A call of attention: sizes, mask and type. `heads` query heads, `kv_heads` key/value heads of `head_dim`."""

    mask: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    mean_document: int = 4096
    seed: int = 0

    @property
    def window(self) -> int | None:
        return int(self.mask.split(":")[1]) if self.mask.startswith("window:") else None

    def at(self, length: int) -> "Workload":
        """The same at a shorter length, where an eighth of it is the longest mean document, a quarter the window."""
        if length == self.length:
            return self
        mean = max(2, min(self.mean_document, length // 8))
        mask = f"window:{max(1, min(self.window, length // 4))}" if self.window else self.mask
        return dataclasses.replace(self, mask=mask, length=length, mean_document=mean)

    def arguments(self) -> dict:
        """What to call `rj.attention` and its like with; `packed` is a reach beside these."""
        return dict(causal=self.mask != "full", window=self.window)

    def reach(self) -> rj.Reach | None:
        """The reach in ascending order, where arguments don't say it."""
        return rj.Reach.packed(jnp.asarray(self.positions())) if self.mask == "packed" else None

    def positions(self) -> Int[np.ndarray, "B T"]:
        """Of each token in its document."""
        return np.stack([positions(self.length, self.mean_document, self.seed + row) for row in range(self.batch)])

    @functools.cached_property
    def interval(self) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        """`start` and `stop` of the keys that each query sees, in ascending order; counted here, not by the library."""
        g = np.broadcast_to(np.arange(self.length), (self.batch, self.length))
        if self.mask == "full":
            return np.zeros_like(g), np.full_like(g, self.length)
        if self.mask == "packed":
            return g - self.positions(), g + 1
        return np.maximum(0, g - (self.window or self.length) + 1), g + 1

    @functools.cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs of the batch."""
        start, stop = self.interval
        return int((stop - start).sum(dtype=np.int64))

    def flops(self, kind: str) -> float:
        """Useful FLOPs of a pass, "forward" or "both"."""
        return flops(self.pairs, self.heads, self.head_dim, kind)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v and dout."""
        queries = self.batch, self.length, self.heads, self.head_dim
        keys = self.batch, self.length, self.kv_heads, self.head_dim
        return queries, keys, keys, queries


def flops(pairs: int, heads: int, head_dim: int, kind: str) -> float:
    """Useful FLOPs of `pairs` visible pairs, in a pass "forward" or "both"."""
    return 4.0 * pairs * heads * head_dim * (1 + BACKWARD if kind == "both" else 1)


def positions(length: int, mean: int, seed: int) -> Int[np.ndarray, " T"]:
    """Positions of a row of documents of log-normal lengths with this mean; the last one is cut."""
    rng = np.random.default_rng(seed)
    lengths, total = [], 0
    while total < length:
        document = max(1, round(rng.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA)))
        lengths.append(min(document, length - total))
        total += document
    return np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])


def inputs(work: Workload, sharding=None) -> tuple[Array, Array, Array, Array]:
    """q, k, v and dout, normally distributed, in ascending order; `sharding` of their axes `[B, T, …]`."""

    def draw(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        return tuple(jax.random.normal(key, shape, work.dtype) for key, shape in zip(keys, work.shapes()))

    # One seed is one set of numbers on any number of devices: threefry is computed where its numbers lie.
    return jax.jit(draw, out_shardings=sharding)(work.seed)


def in_layout(arrays, layout: str, ring_size: int, mesh) -> tuple[Array, ...]:
    """`arrays` (ascending, sharded) in the order of a layout, sharded over `mesh`."""
    order = rj.layouts.get(layout)
    place = NamedSharding(mesh, PartitionSpec(None, "sp"))
    move = lambda *xs: tuple(order.permute(x, ring_size, axis=1) for x in xs)  # noqa: E731
    return jax.jit(move, out_shardings=place)(*arrays)


def places(layout: str, ring_size: int, length: int) -> Int[np.ndarray, " T"]:
    """Where the token of each global index sits in layout order."""
    order = rj.layouts.get(layout).permute(np.arange(length)[None], ring_size, axis=1)[0]
    return np.argsort(order)
