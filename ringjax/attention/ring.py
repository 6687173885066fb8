"""Ring attention: K and V travel around the devices while queries stay (Liu et al. 2023, arXiv:2310.01889).

Every device holds one shard of the sequence. In each of R hops it attends to the K and V that are visiting
and passes them on, so that after R hops each query has met each key and no device ever held more than two
shards of K and V:

    hop 0: 0→1→2→3→0 ┐  device d attends to shard d
    hop 1:           ├  device d attends to shard d − 1, which arrived while hop 0 computed
    …                ┘

The backward pass goes around once more, visitors first and the device's own keys last. dQ stays; the sums dK and dV
travel one hop behind their K and V, so that neither rotation waits for the compute that it hides behind, and come
home while the device attends to its own:

    hop 1 … R − 1:  device d attends to shard d − 1, …, d − R + 1, each time adding to the sums that came along
    hop 0:          the sums go home, device d attends to shard d

The first rotation has only what comes before to hide behind. Where a kernel finds dQ apart from dK and dV, it hides
behind the device's own dQ, and the way home behind its own dK and dV.
"""

import dataclasses
import os
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ringjax.attention import hop, patterns
from ringjax.attention.hop import INTERVAL, Case, Cases
from ringjax.attention.kernels.base import Gradients, Kernels, Score, accumulator, target, varying_like
from ringjax.attention.layouts import Layout
from ringjax.attention.merge import Partial, empty

# A list of hops with unequal steps cannot be a scan; past this length the plain ring (all hops) is used.
MOST_UNROLLED = 16


@dataclasses.dataclass(frozen=True)
class Ring:
    """`size` groups of `width` neighbouring devices along `axis_name`; K and V go from group to group.

    `offsets` are the hops that somebody needs: in each, group g attends to the shard of group g − offset.
    `width` is 1 except under Ulysses, where the devices of a group share the tokens of their shards, in
    ascending order, and split the heads. A ring of one group (`axis_name` may be None) is attention on one device.
    `mask` is "causal" or "full" where that is known when the function is traced, "window" where it is known to be
    neither, None where `start` and `stop` say it.
    """

    layout: Layout
    axis_name: str | None
    size: int
    offsets: tuple[int, ...]
    width: int = 1
    unroll: bool = False
    mask: str | None = None

    @classmethod
    def of(
        cls, layout: Layout, axis_name: str | None, size: int, *, length: int, width: int = 1,
        max_behind: int | None = None, max_ahead: int | None = None, unroll: bool | None = None,
        mask: str | None = None,
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
        return cls(layout, axis_name, size, tuple(offsets), width, unroll, mask)

    def forward(
        self, kernels: Kernels, score: Score, q, k, v, start, stop, *, partial: Partial | None = None, dtype=None
    ) -> Partial:
        """Attention of the local queries over the global interval `start … stop − 1` of each, merged with `partial`
        (None: nothing yet); out in `dtype` (None: q's).

        q `[B, T, N, H]`, k `[B, S, K, H]`, v `[B, S, K, Hv]`, start and stop int32 `[B, T]`: the local shards.
        """
        wire, wide = Wire.of(k, v), accumulator(q, k, v)
        last = len(self.offsets) - 1
        mask = self._mask(kernels, q, k, start, stop)

        def attend(visiting, partial, offset, dtype, arriving=None):
            cases, slots = mask.cases(offset, forward=True), mask.slots(offset)
            return hop.forward(cases, kernels, score, partial, q, *wire.unpack(visiting), *slots, dtype, arriving)

        def move_and_attend(carry, offset, step, _):
            visiting, partial = carry
            # Unrolled, the first result is taken as the kernel gives it; a scan carries one type.
            dtype = None if self.unroll and partial is None else wide
            partial, arriving = attend(visiting, partial, offset, dtype, self._rotate(visiting, step))
            return arriving, partial

        if partial is not None:
            partial = Partial(partial.out.astype(wide), partial.lse)
        elif last > 0 and not self.unroll:
            partial = varying_like(empty(*q.shape[:3], v.shape[-1], wide), q, k, v, start, stop)
        visiting, partial = self._hops(move_and_attend, (wire.pack(k, v), partial), 0, last)
        return attend(visiting, partial, self.offsets[last], dtype or q.dtype)[0]

    def backward(
        self, kernels: Kernels, score: Score, q, k, v, out, lse, dout, delta, start, stop, *, dq=None, dtype=None
    ) -> Gradients:
        """Gradients of the local q (in `dtype`, None: its own), k and v (float32), from the local queries' merged out
        and lse; that of q is added to `dq` (None: nothing yet)."""
        wire, wide = Wire.of(k, v), accumulator(q, k, v)
        last = len(self.offsets) - 1
        mask = self._mask(kernels, q, k, start, stop)

        def attend(visiting, dq, offset, dtype, arriving=None, dout=dout):
            cases, slots = mask.cases(offset, forward=False), mask.slots(offset)
            inputs = (q, *wire.unpack(visiting), out, lse, dout, delta)
            return hop.backward(cases, kernels, score, dq, *inputs, *slots, dtype, arriving)

        if last == 0:
            return attend(wire.pack(k, v), dq, self.offsets[0], dtype or q.dtype)[0]

        def add(summed, grads):
            here = wire.pack(grads.dk, grads.dv)
            if summed is None and last == 1:  # no sum yet, so no need to send more than the kernel gave
                return here
            here = jax.tree.map(lambda x: x.astype(wide), here)
            return here if summed is None else jax.tree.map(jnp.add, summed, here)

        def visit(carry, offset, step, step_before):
            visiting, dq, summed = carry
            arriving = None if step is None else self._rotate(visiting, step)
            summed = None if step_before is None else self._rotate(summed, step_before)
            dtype = None if self.unroll and dq is None else wide
            grads, (arriving, summed) = attend(visiting, dq, offset, dtype, (arriving, summed))
            return arriving, grads.dq, add(summed, grads)

        own, first = wire.pack(k, v), self.offsets[0]
        visiting = self._rotate(own, self._step(0))
        apart = mask.cases(first, forward=False).branches == (INTERVAL,) and kernels.interval.separate
        if apart:  # the compiler drops the pass whose results are not used
            visiting, dq = _finish((visiting, attend(own, dq, first, None if self.unroll else wide)[0].dq))
        carry = visiting, dq, None
        if last > 1:
            carry = _finish(visit(carry, self.offsets[1], self._step(1), None))
            carry = self._hops(visit, carry, 2, last)
        _, dq, summed = visit(carry, self.offsets[last], None, self._step(last - 1) if last > 1 else None)
        if apart:
            dq, summed, dout = _finish((dq, summed, dout))
        # The sums are on their way home while the device attends to its own keys.
        summed = self._rotate(summed, -self.offsets[last])
        grads, summed = attend(own, None if apart else dq, first, dtype or q.dtype, summed, dout)
        dk, dv = wire.unpack(add(summed, grads))
        return Gradients(dq.astype(dtype or q.dtype) if apart else grads.dq, dk, dv)

    def _hops(self, visit: Callable, carry, first: int, last: int):
        """`visit(carry, offset, step to the next offset, step from the one before)` for the hops first … last − 1."""
        if last <= first:
            return carry
        if self.unroll:
            for i in range(first, last):
                carry = _finish(visit(carry, self.offsets[i], self._step(i), self._step(i - 1) if i else None))
            return carry
        hops = jnp.arange(first, last, dtype=jnp.int32)  # a scan is for uniform offsets: every step is 1
        return lax.scan(lambda carry, offset: (visit(carry, offset, 1, 1), None), carry, hops)[0]

    def _step(self, i: int) -> int:
        return self.offsets[i + 1] - self.offsets[i]

    def _mask(self, kernels: Kernels, q, k, start, stop) -> "Mask":
        length, keys = q.shape[1], k.shape[1]
        known, may_be_causal = None, length == keys and self.mask != "window"
        if self.mask == "full":
            known = patterns.Patterns(*[patterns.whole(length, keys)] * 3)
        elif may_be_causal and (self.width == 1 or self.size == 1 or self.layout.groups_stay_in_order):
            known = self.layout.causal_patterns(length)
        return Mask(self, kernels, known, keys, start, stop)

    def _slots_below(self, x: Int[Array, "B T"], group, length: int) -> Int[Array, "B T"]:
        """A group holds the slots of its `width` shards, so it holds as many below x as they do together."""
        devices, share = self.size * self.width, length // self.width
        if self.size == 1 and self.width == 1:
            return jnp.clip(x, 0, length)
        shards = (group * self.width + i for i in range(self.width))
        return sum(self.layout.slots_below(x, shard, devices, share) for shard in shards)

    def _group(self):
        return 0 if self.size == 1 else lax.axis_index(self.axis_name) // self.width

    def _source(self, group, offset):
        """The group whose K and V visit `group` in the hop at `offset`."""
        return (group - offset) % self.size

    def _is_own(self, offset) -> bool:
        """Whether the hop at `offset` is known to be the one in which every group attends to its own K and V."""
        return isinstance(offset, int) and offset == 0

    def _is_other(self, offset) -> bool:
        """Whether it is known not to be."""
        return isinstance(offset, int) and offset != 0

    def _rotate(self, x, step: int):
        """What group g holds goes to group g + step."""
        devices = self.size * self.width
        pairs = [(i, (i + step * self.width) % devices) for i in range(devices)]
        with jax.named_scope("ring/rotate"):
            return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis_name, pairs), x)


@dataclasses.dataclass(frozen=True)
class Mask:
    """What the local queries see of each visiting shard, as far as it is known before the data are."""

    ring: Ring
    kernels: Kernels
    patterns: patterns.Patterns | None
    keys: int
    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]

    def cases(self, offset, *, forward: bool) -> Cases:
        """What the hop at `offset` (a number, or traced) may be."""
        group, source = self._groups(offset)
        own = self.ring._is_own(offset)
        if self._intervals_only(own, forward):
            return Cases((INTERVAL,))
        known, which = [], 0
        if self.patterns is not None:
            earlier, itself, later = (self._case(pattern, forward) for pattern in self.patterns)
            if own:
                known = [itself]
            elif self.ring._is_other(offset):
                known, which = [earlier, later], source > group
            else:  # inside a scan: it may be either
                known, which = [earlier, itself, later], 1 + jnp.sign(source - group)
        if self._static and known:
            return Cases.of(known, which)
        if not (known and self.kernels.either):
            return Cases.of([INTERVAL] if own else [None, INTERVAL], self._some(offset))
        if own:
            return Cases.of([INTERVAL, *known], self._plain())
        return Cases.of([None, INTERVAL, *known], jnp.where(self._plain(), 2 + which, self._some(offset)))

    @property
    def _static(self) -> bool:
        return self.ring.mask in ("causal", "full")

    def _intervals_only(self, own: bool, forward: bool) -> bool:
        """Whether the kernel for intervals takes the hop, whatever it is.

        XLA on GPUs reads a branch's index on the host: the device waits, and nothing runs ahead. A fused kernel for
        intervals needs no branch. Forward it is as fast as one for rectangles; backward it loses more than the wait
        takes, also on a shard of 8192 tokens (docs/results/attention.md).
        """
        if not (self.kernels.either and self.kernels.interval.fused):
            return False
        return self.ring.mask == "window" or (forward and not (self._static and own))

    def _case(self, pattern: patterns.Pattern | None, forward: bool) -> Case:
        """The pattern, or INTERVAL where a kernel for intervals does it at least as well."""
        if pattern is None:
            return None
        interval, dense = self.kernels.interval, self.kernels.dense
        # Without copies of the queries but the first: a striped ring's hop is as fast then as one that needs none.
        copies = forward and pattern.causal and pattern.queries[0] > 0
        return INTERVAL if dense is None or (copies and interval is not None and interval.fused) else pattern

    def _some(self, offset) -> Bool[Array, ""]:
        """Whether any local query sees a visiting key."""
        lo, hi = self.slots(offset)
        return jnp.any(lo < hi)

    def slots(self, offset) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """lo and hi of every local query in the slots of the shard that visits in the hop at `offset`."""
        _, source = self._groups(offset)
        return tuple(self.ring._slots_below(x, source, self.keys) for x in (self.start, self.stop))

    def _plain(self) -> Bool[Array, ""]:
        """Whether the local queries' intervals, which are data, happen to be those of a plain causal mask."""
        group, length = self.ring._group(), self.start.shape[1]
        index = self.ring.layout.slots(group, self.ring.size, length)
        return jnp.all(self.start <= 0) & jnp.all(self.stop == index + 1)

    def _groups(self, offset):
        group = self.ring._group()
        return group, self.ring._source(group, offset)


@dataclasses.dataclass(frozen=True)
class Wire:
    """What travels in a hop: K and V, or the sums of their gradients.

    Two arrays where both can be under way at once, since kernels read what arrives as it is. Elsewhere one, stacked or
    side by side if the head sizes differ: on simulated devices a message costs more than a copy, and XLA hides one
    collective of a GPU at a time unless told otherwise (`ringjax.accelerator`).
    """

    joined: bool
    head_dims: tuple[int, int]

    @classmethod
    def of(cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K Hv"]) -> "Wire":
        several = {"tpu": True, "gpu": _several_in_flight()}.get(target().platform, False)
        return cls(not several, (k.shape[-1], v.shape[-1]))

    def pack(self, k: Array, v: Array) -> Array | tuple[Array, Array]:
        if not self.joined:
            return k, v
        return jnp.stack([k, v]) if self.head_dims[0] == self.head_dims[1] else jnp.concatenate([k, v], axis=-1)

    def unpack(self, packed: Array | tuple[Array, Array]) -> tuple[Array, Array]:
        if not self.joined or self.head_dims[0] == self.head_dims[1]:
            return packed[0], packed[1]
        return packed[..., : self.head_dims[0]], packed[..., self.head_dims[0] :]


def _several_in_flight() -> bool:
    limit = re.search(r"parallel_collective_overlap_limit=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return limit is not None and int(limit[1]) >= 4  # K, V, and the sums for each


def _finish(carry):
    """Ends an unrolled hop: what it computes and what arrives meanwhile are done before the next begins, as in a scan.

    Without it XLA's scheduler for TPUs mixes hops: some rotations have nothing to hide behind then, and twice the
    memory is held (docs/results/tpu_overlap.md).
    """
    return lax.optimization_barrier(carry)


def _group_offsets(devices: list[int], size: int, width: int) -> list[int]:
    """Offsets between groups, from offsets between devices: d − offset may fall into either neighbouring group."""
    return sorted({g % size for d in devices for g in (d // width, -(-d // width))})
