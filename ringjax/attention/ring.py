"""Ring attention: K and V travel around the devices while queries stay (Liu et al. 2023, arXiv:2310.01889).

Every device holds one shard of the sequence. In each of R hops it attends to the K and V that are visiting
and passes them on, so that after R hops each query has met each key and no device ever held more than two
shards of K and V:

    hop 0: 0→1→2→3→0 ┐  device d attends to shard d
    hop 1:           ├  device d attends to shard d − 1, which arrived while hop 0 computed
    …                ┘

The backward pass goes around once more. dQ stays; the sums dK and dV travel one hop behind their K and V, so
that neither rotation waits for the compute that it hides behind.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ringjax.attention.kernels.base import Gradients, Kernel, Score, accumulator, varying_like
from ringjax.attention.layouts import Layout
from ringjax.attention.merge import Partial, empty, merge

# A list of hops with unequal steps cannot be a scan; past this length the plain ring (all hops) is used.
MOST_UNROLLED = 16


@dataclasses.dataclass(frozen=True)
class Ring:
    """`size` groups of `width` neighbouring devices along `axis_name`; K and V go from group to group.

    `offsets` are the hops that somebody needs: in each, group g attends to the shard of group g − offset.
    `width` is 1 except under Ulysses, where the devices of a group share the tokens of their shards, in
    ascending order, and split the heads. A ring of one group (`axis_name` may be None) is attention on one device.
    """

    layout: Layout
    axis_name: str | None
    size: int
    offsets: tuple[int, ...]
    width: int = 1
    unroll: bool = False

    @classmethod
    def of(
        cls, layout: Layout, axis_name: str | None, size: int, *, length: int, width: int = 1,
        max_behind: int | None = None, max_ahead: int | None = None, unroll: bool | None = None,
    ) -> "Ring":  # fmt: skip
        """The ring whose hops serve queries that see at most `max_behind` and `max_ahead` tokens (None: all).

        `length` is the number of slots of one device. `unroll=None` unrolls rings of up to 4.
        """
        offsets = list(range(size))
        if max_behind is not None and max_ahead is not None and size > 1:
            devices = layout.offsets(max_behind, max_ahead, size * width, length)
            needed = _group_offsets(devices, size, width)
            if needed == list(range(len(needed))) or len(needed) <= MOST_UNROLLED:
                offsets = needed
        if unroll is None:
            unroll = len(offsets) <= 4
        unroll = unroll or offsets != list(range(len(offsets)))
        return cls(layout, axis_name, size, tuple(offsets), width, unroll)

    def forward(self, kernel: Kernel, score: Score, q, k, v, start, stop) -> Partial:
        """Attention of the local queries over the global interval `start … stop − 1` of each.

        q `[B, T, N, H]`, k `[B, S, K, H]`, v `[B, S, K, Hv]`, start and stop int32 `[B, T]`: the local shards.
        """
        wire = Wire.of(k, v)
        last = len(self.offsets) - 1
        nothing = empty(*q.shape[:3], v.shape[-1], accumulator(q, k, v))

        def hop(carry, offset, step):
            visiting, partial = carry
            arriving = visiting if step is None else self._rotate(visiting, step)
            seen = self._attend(kernel.forward, score, (q, *wire.unpack(visiting)), offset, start, stop, nothing)
            with jax.named_scope("ring/merge"):
                return arriving, merge(partial, seen)

        carry = wire.packed, varying_like(nothing, q, k, v, start, stop)
        carry = self._hops(hop, carry, 0, last)
        return hop(carry, self.offsets[last], None)[1]

    def backward(self, kernel: Kernel, score: Score, q, k, v, out, lse, dout, delta, start, stop) -> Gradients:
        """Gradients of the local q, k, v in float32, from the merged out, lse and delta of the local queries."""
        wire = Wire.of(k, v)
        last = len(self.offsets) - 1
        queries = (out, lse, dout, delta)
        nothing = Gradients(*(jnp.zeros(x.shape, accumulator(q, k, v)) for x in (q, k, v)))

        def hop(carry, offset, step, step_before):
            visiting, dq, summed = carry
            arriving = visiting if step is None else self._rotate(visiting, step)
            summed = summed if step_before is None else self._rotate(summed, step_before)
            inputs = (q, *wire.unpack(visiting), *queries)
            grads = self._attend(kernel.backward, score, inputs, offset, start, stop, nothing)
            here = Wire.of(grads.dk, grads.dv).packed
            return arriving, dq + grads.dq, jax.tree.map(jnp.add, summed, here)

        zeros = varying_like(nothing, q, k, v, dout, start, stop)
        carry = wire.packed, zeros.dq, Wire.of(zeros.dk, zeros.dv).packed
        if last > 0:
            carry = hop(carry, self.offsets[0], self._step(0), None)
        # In the uniform stretch every step is 1, so the step before is the same.
        middle = lambda carry, offset, step: hop(carry, offset, step, step)  # noqa: E731
        if self.unroll:
            for i in range(1, last):
                carry = hop(carry, self.offsets[i], self._step(i), self._step(i - 1))
        else:
            carry = self._hops(middle, carry, 1, last)
        _, dq, summed = hop(carry, self.offsets[last], None, self._step(last - 1) if last > 0 else None)
        if last > 0:
            summed = self._rotate(summed, -self.offsets[last])
        return Gradients(dq, *wire.unpack(summed))

    def _hops(self, hop: Callable, carry, first: int, last: int):
        """`hop` at the offsets first … last − 1, each of which passes K and V on."""
        if last <= first:
            return carry
        if self.unroll:
            for i in range(first, last):
                carry = hop(carry, self.offsets[i], self._step(i))
            return carry
        return lax.scan(
            lambda carry, offset: (hop(carry, offset, 1), None), carry, jnp.arange(first, last, dtype=jnp.int32)
        )[0]

    def _step(self, i: int) -> int:
        return self.offsets[i + 1] - self.offsets[i]

    def _attend(self, function, score: Score, inputs, offset, start, stop, nothing):
        """One call of the kernel, left out where no local query sees a visiting key."""
        length = inputs[1].shape[1]
        source = (self._group() - offset) % self.size
        lo, hi = (self._slots_below(x, source, length) for x in (start, stop))
        with jax.named_scope("ring/attend"):
            if self.size == 1:
                return function(*inputs, lo, hi, score)
            # Only the compute is conditional: all devices must reach every rotation.
            return lax.cond(
                jnp.any(lo < hi),
                lambda *args: function(*args, score),
                lambda *args: varying_like(nothing, *args),
                *inputs, lo, hi,
            )  # fmt: skip

    def _slots_below(self, x: Int[Array, "B T"], group, length: int) -> Int[Array, "B T"]:
        """A group holds the slots of its `width` shards, so it holds as many below x as they do together."""
        devices, share = self.size * self.width, length // self.width
        if self.size == 1 and self.width == 1:
            return jnp.clip(x, 0, length)
        shards = (group * self.width + i for i in range(self.width))
        return sum(self.layout.slots_below(x, shard, devices, share) for shard in shards)

    def _group(self):
        return 0 if self.size == 1 else lax.axis_index(self.axis_name) // self.width

    def _rotate(self, x, step: int):
        """What group g holds goes to group g + step."""
        devices = self.size * self.width
        pairs = [(i, (i + step * self.width) % devices) for i in range(devices)]
        with jax.named_scope("ring/rotate"):
            return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis_name, pairs), x)


@dataclasses.dataclass(frozen=True)
class Wire:
    """K and V as one array, so that a hop is one transfer: stacked, or side by side if their head sizes differ."""

    packed: Array
    head_dims: tuple[int, int]

    @classmethod
    def of(cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K Hv"]) -> "Wire":
        head_dims = (k.shape[-1], v.shape[-1])
        packed = jnp.stack([k, v]) if head_dims[0] == head_dims[1] else jnp.concatenate([k, v], axis=-1)
        return cls(packed, head_dims)

    def unpack(self, packed: Array) -> tuple[Array, Array]:
        if self.head_dims[0] == self.head_dims[1]:
            return packed[0], packed[1]
        return packed[..., : self.head_dims[0]], packed[..., self.head_dims[0] :]


def _group_offsets(devices: list[int], size: int, width: int) -> list[int]:
    """Offsets between groups, from offsets between devices: d − offset may fall into either neighbouring group."""
    return sorted({g % size for d in devices for g in (d // width, -(-d // width))})
