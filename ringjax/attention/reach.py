"""Masks as intervals: how many tokens behind and ahead each query sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ringjax.attention import layouts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reach:
    """The query at global index g sees the keys of `[g − behind, g + ahead]`.

    `behind` and `ahead` are int32 `[B, T]`, one entry a query; they travel with the tokens through any
    permutation of the sequence. `behind = −1, ahead = 0` sees nothing (padding). Indices outside the
    sequence are clipped.

    `max_behind` and `max_ahead` are static bounds (None: unknown): larger entries are clipped to them, so
    a ring knows without looking at data which rotations nobody needs.
    """

    behind: Int[Array, "B T"]
    ahead: Int[Array, "B T"]
    max_behind: int | None = dataclasses.field(default=None, metadata={"static": True})
    max_ahead: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def causal(cls, batch: int, seq_len: int, window: int | None = None) -> "Reach":
        """Every earlier token and itself; with `window`, at most the last `window` tokens, itself included."""
        position = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), (batch, seq_len))
        return cls.packed(position, window)

    @classmethod
    def packed(cls, positions: Int[Array, "B T"], window: int | None = None) -> "Reach":
        """Causal inside each document: `positions` `[B, T]` counts from 0 at each document's first token."""
        positions = jnp.asarray(positions, jnp.int32)
        reach = cls(positions, jnp.zeros_like(positions), max_ahead=0)
        return reach if window is None else reach.within(window)

    @classmethod
    def full(cls, batch: int, seq_len: int) -> "Reach":
        """Every token sees every token."""
        g = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), (batch, seq_len))
        return cls(g, seq_len - 1 - g)

    def within(self, window: int) -> "Reach":
        """The same mask, cut to the keys less than `window` tokens away (`window` counts the query itself)."""
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window {window!r} must be an integer of at least 1: it counts the query's own token")
        return dataclasses.replace(
            self,
            behind=jnp.minimum(self.behind, window - 1),
            ahead=jnp.minimum(self.ahead, window - 1),
            max_behind=_smaller(self.max_behind, window - 1),
            max_ahead=_smaller(self.max_ahead, window - 1),
        )

    def looking_ahead(self, tokens_left: Int[Array, "B T"]) -> "Reach":
        """Bidirectional spans: each query also sees the `tokens_left` `[B, T]` tokens after it.

        For the tokens of one image, frame or prefix, that is the number of tokens left in it; 0 elsewhere.
        """
        ahead = jnp.maximum(self.ahead, jnp.asarray(tokens_left, jnp.int32))
        return dataclasses.replace(self, ahead=ahead, max_ahead=None)

    def masked(self, valid: Array) -> "Reach":
        """Queries where `valid` (bool `[B, T]`) is false see nothing."""
        return dataclasses.replace(
            self, behind=jnp.where(valid, self.behind, -1), ahead=jnp.where(valid, self.ahead, 0)
        )

    def permute(self, layout: str | layouts.Layout, ring_size: int) -> "Reach":
        """The same reach with the queries in the order of `layout`."""
        order = layouts.get(layout)
        behind, ahead = (order.permute(x, ring_size, 1) for x in (self.behind, self.ahead))
        return dataclasses.replace(self, behind=behind, ahead=ahead)

    def interval(self, index: Int[Array, "*B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Global `start` and `stop` of the keys seen by the queries at global `index` (`[T]` or `[B, T]`)."""
        behind = self.behind if self.max_behind is None else jnp.minimum(self.behind, self.max_behind)
        ahead = self.ahead if self.max_ahead is None else jnp.minimum(self.ahead, self.max_ahead)
        return index - behind, index + ahead + 1

    def validate(self, batch: int, length: int) -> None:
        """Raises ValueError where the arrays are not int32 `[batch, length]`."""
        for name in ("behind", "ahead"):
            array = getattr(self, name)
            if not hasattr(array, "dtype") or array.dtype != np.dtype("int32"):
                found = getattr(array, "dtype", type(array).__name__)
                raise ValueError(f"reach.{name} has type {found}; it counts tokens: give an int32 array [B, T]")
            if tuple(array.shape) != (batch, length):
                raise ValueError(
                    f"reach.{name} has shape {tuple(array.shape)}; it holds one entry a query, "
                    f"so it must be [B, T] = {(batch, length)}"
                )


def _smaller(bound: int | None, other: int) -> int:
    return other if bound is None else min(bound, other)
