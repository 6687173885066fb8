"""Fused attention for TPUs: Pallas kernels that visit only the blocks that the intervals of queries touch.

Built on the idea of splash attention (jax.experimental.pallas.ops.tpu.splash_attention), sparse flash attention whose
list of blocks is prefetched into scalar memory, but not on its code. That takes its list from a mask that is known when
the program is traced, steps over the blocks it skips, masks blocks that are seen whole, multiplies float32 as bfloat16,
rounds dQ, dK and dV to the type of the inputs, and cannot be called where `shard_map` checks what varies. Here the list
is computed from lo and hi (`visits.py`), and all results leave in float32 (`passes.py`).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from ringjax.attention.kernels import base
from ringjax.attention.kernels.base import Gradients, Kernel, Score
from ringjax.attention.kernels.splash import passes
from ringjax.attention.kernels.splash.visits import Cut, Order, visits
from ringjax.attention.merge import Partial

# A visit is an int32 in scalar memory, of which a core has a megabyte and the compiler keeps some for itself. What lies
# within both limits compiles for v5e, v5p and v6e (tests/attention/test_tpu.py).
MOST_VISITS = 2**17
MOST_HEAD_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Splash:
    """Attention in tiles of at most `query_tile` queries and blocks of at most `key_block` keys.

    `interpret` is for tests on machines without a TPU: Pallas then runs the kernels in JAX (True, or
    `pltpu.InterpretParams`, which also finds races and reads outside of arrays).
    """

    query_tile: int = 1024
    key_block: int = 512
    interpret: Any = False

    def forward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        lo: Int[Array, "B T"],
        hi: Int[Array, "B T"],
        score: Score,
    ) -> Partial:
        """As `reference.forward`; out is float32."""
        order = self._order(q, k)
        lo, hi = _intervals(lo, hi, order)
        q, k, v = _head_major(q, order.queries), _head_major(k, order.keys), _head_major(v, order.keys)
        seen = visits(order, lo, hi)
        out, lse = passes.forward(q, k, v, _row(lo), _row(hi), score, order, seen, self.interpret)
        return Partial(_token_major(out, order.queries), lse[:, :, 0, : order.queries.length])

    def backward(self, q, k, v, out, lse, dout, delta, lo, hi, score: Score) -> Gradients:
        """As `reference.backward`, in float32."""
        del out
        by_queries = self._order(q, k)
        by_keys = dataclasses.replace(by_queries, by_keys=True)
        queries, keys = by_queries.queries, by_queries.keys
        lo, hi = _intervals(lo, hi, by_queries)
        lse = jnp.where(jnp.isneginf(lse), 0, lse)  # such a query sees nothing here either, and exp stays finite
        inputs = (
            _head_major(q, queries), _head_major(k, keys), _head_major(v, keys), _statistic(lse, queries),
            _head_major(dout, queries), _statistic(delta, queries), _row(lo), _row(hi), score,
        )  # fmt: skip
        dq = passes.backward_queries(*inputs, by_queries, visits(by_queries, lo, hi), self.interpret)
        dk, dv = passes.backward_keys(*inputs, by_keys, visits(by_keys, lo, hi), self.interpret)
        return Gradients(_token_major(dq, queries), _token_major(dk, keys), _token_major(dv, keys))

    def refuses(self, q, k, v, score: Score) -> str | None:
        """Why these inputs are not served (None: they are)."""
        del score
        if q.dtype not in (jnp.bfloat16, jnp.float32):
            return f"dtype {q.dtype}; it takes bfloat16 and float32"
        for name, x in (("q and k", q), ("v", v)):
            if x.shape[-1] % 8 or x.shape[-1] * x.dtype.itemsize > MOST_HEAD_BYTES:
                most = MOST_HEAD_BYTES // x.dtype.itemsize
                return f"head size {x.shape[-1]} of {name}; in {x.dtype} it takes multiples of 8 up to {most}"
        order = self._order(q, k)
        most = q.shape[0] * order.queries.count * order.keys.count
        if most > MOST_VISITS:
            return (
                f"{q.shape[0]} rows of {q.shape[1]} queries and {k.shape[1]} keys on a device make {most} pairs of tile"
                f" and block, more than the {MOST_VISITS} that fit into scalar memory; use smaller shards"
            )
        return None

    def unavailable(self) -> str | None:
        """Why the target cannot run it (None: it can)."""
        platform = base.target().platform
        return None if self.interpret or platform == "tpu" else f"it runs on TPUs, and this is a {platform}"

    def _order(self, q, k) -> Order:
        return Order(Cut.of(q.shape[1], self.query_tile), Cut.of(k.shape[1], self.key_block))


def kernel(**options) -> Kernel:
    """The backend, with `options` of `Splash`."""
    splash = Splash(**options)
    return Kernel("splash", splash.forward, splash.backward, splash.unavailable, splash.refuses)


def _head_major(x: Float[Array, "B T N H"], cut: Cut) -> Float[Array, "B N T H"]:
    return _pad(rearrange(x, "b t n h -> b n t h"), cut, 2)


def _token_major(x: Float[Array, "B N T H"], cut: Cut) -> Float[Array, "B T N H"]:
    return rearrange(x[:, :, : cut.length], "b n t h -> b t n h")


def _statistic(x: Float[Array, "B N T"], cut: Cut) -> Float[Array, "B N 1 T"]:
    return rearrange(_pad(x, cut, 2), "b n t -> b n 1 t")


def _row(x: Int[Array, "B T"]) -> Int[Array, "B 1 1 T"]:
    return rearrange(x, "b t -> b 1 1 t")


def _intervals(lo, hi, order: Order) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Inside the keys, and empty for the queries that pad the last tile."""
    return tuple(_pad(jnp.clip(x, 0, order.keys.length), order.queries, 1) for x in (lo, hi))


def _pad(x: Array, cut: Cut, axis: int) -> Array:
    if cut.padded == cut.length:
        return x
    return jnp.pad(x, [(0, cut.padded - cut.length if i == axis else 0) for i in range(x.ndim)])


KERNEL = kernel()
