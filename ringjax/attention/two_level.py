"""A ring of rings for links of two speeds: K and V go around inside each host, and to the next host meanwhile.

With M hosts of L devices, R = M · L, device l of host m attends in turn o, hop i to the shard of

    host m − o (mod M), place l − i (mod L)

    turn 0   inside:  0→1→2→3→0   4→5→6→7→4     every device attends to the shards of its own host,
             across:  0→4→0  1→5→1  …           and sends its own to the same place of the next host
    turn 1   inside:  as before, with the shards of the host before

In the plain ring one device of each host sends across the slow link, in every one of R − 1 hops, each of which waits
for it. Here all L devices send at once, each by its own adapter, M − 1 times, and a transfer has the compute of L hops
to hide behind. The bytes that leave a host are nearly the same: (M − 1) · L shards, and R − 1.

The backward pass goes around once more, other hosts' shards first and the own host's last. The sums dK and dV of a
turn come home inside the host and then follow their K and V to the next host one turn behind; the way home across
hides behind the own host's turn. What nothing hides: the first transfer across, and the first rotation of each turn.

The double ring of LoongTrain (Gu et al. 2024, arXiv:2406.18485, §4.3), with any layout and mask.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ringjax.attention.kernels.base import Gradients, Kernels, Score, accumulator
from ringjax.attention.merge import Partial
from ringjax.attention.ring import Ring, Wire, _finish

# More turns than so many, and more hops of a turn, are a scan.
MOST_UNROLLED = 4


@dataclasses.dataclass(frozen=True)
class Turn(Ring):
    """The hops inside hosts of `inside` devices while the K and V of `turn` hosts before visit.

    `size` counts all devices, `offsets` the hops inside.
    """

    inside: int = 1
    turn: int | Int[Array, ""] = 0

    def _source(self, group, offset):
        host, place = group // self.inside, group % self.inside
        hosts = self.size // self.inside
        return (host - self.turn) % hosts * self.inside + (place - offset) % self.inside

    def _is_own(self, offset) -> bool:
        return isinstance(self.turn, int) and self.turn == 0 and super()._is_own(offset)

    def _is_other(self, offset) -> bool:
        return (isinstance(self.turn, int) and self.turn != 0) or super()._is_other(offset)

    def _rotate(self, x, step: int):
        place = [(i, i // self.inside * self.inside + (i + step) % self.inside) for i in range(self.size)]
        with jax.named_scope("ring/rotate_inside"):
            return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis_name, place), x)


@dataclasses.dataclass(frozen=True)
class TwoLevel:
    """`ring` with its devices in hosts of `inside` neighbours; `turns` of the hosts have keys that somebody needs."""

    ring: Ring
    inside: int
    turns: int
    unroll: bool | None = None

    @classmethod
    def of(cls, ring: Ring, inside: int, unroll: bool | None = None) -> "TwoLevel":
        """The hosts whose keys no query of `ring` sees are not visited, where they are the furthest behind.

        `unroll=None` unrolls up to 4 turns, and up to 4 hops inside.
        """
        hosts = ring.size // inside
        # Hop i of turn o is the plain ring's offset o · L + i, or L less where i goes around the host's end.
        needed = {(offset + back) // inside % hosts for offset in ring.offsets for back in (0, inside - 1)}
        return cls(ring, inside, max(needed) + 1, unroll)

    def forward(self, kernels: Kernels, score: Score, q, k, v, start, stop) -> Partial:
        wire, wide, last = Wire.of(k, v), accumulator(q, k, v), self.turns - 1

        def attend(visiting, partial, turn, dtype):
            options = dict(partial=partial, dtype=dtype)
            return self._turn(turn).forward(kernels, score, q, *wire.unpack(visiting), start, stop, **options)

        def visit(carry, turn):
            visiting, partial = carry
            arriving = self._across(visiting, 1)
            return _finish((arriving, attend(visiting, partial, turn, wide)))

        carry = wire.pack(k, v), None
        if last > 0:
            carry = self._over(visit, visit(carry, 0), 1, last)
        visiting, partial = carry
        return attend(visiting, partial, last, q.dtype)

    def backward(self, kernels: Kernels, score: Score, q, k, v, out, lse, dout, delta, start, stop) -> Gradients:
        wire, wide, last = Wire.of(k, v), accumulator(q, k, v), self.turns - 1

        def differentiate(visiting, dq, turn, dtype):
            inputs = (q, *wire.unpack(visiting), out, lse, dout, delta, start, stop)
            grads = self._turn(turn).backward(kernels, score, *inputs, dq=dq, dtype=dtype)
            return grads.dq, jax.tree.map(lambda x: x.astype(wide), wire.pack(grads.dk, grads.dv))

        def visit(carry, turn, *, more: bool = True):
            visiting, dq, summed = carry
            arriving = self._across(visiting, 1) if more else None
            moved = None if summed is None else self._across(summed, 1)
            dq, here = differentiate(visiting, dq, turn, wide)
            return _finish((arriving, dq, here if moved is None else jax.tree.map(jnp.add, moved, here)))

        own, dq, home = wire.pack(k, v), None, None
        if last > 0:
            carry = visit((self._across(own, 1), None, None), 1, more=last > 1)
            if last > 1:
                carry = visit(self._over(visit, carry, 2, last), last, more=False)
            _, dq, summed = carry
            home = self._across(summed, -last)
        dq, here = differentiate(own, dq, 0, q.dtype)
        summed = here if home is None else jax.tree.map(jnp.add, here, home)
        return Gradients(dq, *wire.unpack(summed))

    def _over(self, visit, carry, first: int, last: int):
        """`visit(carry, turn)` for the turns first … last − 1."""
        if self._unrolled(self.turns):
            for turn in range(first, last):
                carry = visit(carry, turn)
            return carry
        if last <= first:
            return carry
        turns = jnp.arange(first, last, dtype=jnp.int32)
        return lax.scan(lambda carry, turn: (visit(carry, turn), None), carry, turns)[0]

    def _turn(self, turn) -> Turn:
        ring, offsets, unroll = self.ring, tuple(range(self.inside)), self._unrolled(self.inside)
        return Turn(
            ring.layout, ring.axis_name, ring.size, offsets, unroll=unroll, mask=ring.mask, inside=self.inside,
            turn=turn,
        )  # fmt: skip

    def _unrolled(self, count: int) -> bool:
        return count <= MOST_UNROLLED if self.unroll is None else self.unroll

    def _across(self, x, step: int):
        """What a device holds goes to the same place of the host `step` further."""
        size, places = self.ring.size, step * self.inside
        pairs = [(i, (i + places) % size) for i in range(size)]
        with jax.named_scope("ring/rotate_across"):
            return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.ring.axis_name, pairs), x)
