"""Rings for measuring only. This is the one file here that knows how a ring is made.

`Still` computes what a ring computes and sends nothing: the difference of their times is the communication that
nothing hides. `share_of(rank)` is what one device of a ring does, on a machine that has no such ring. K and V stay in
both, so their results are right only where all shards hold the same K and V.

They stand in for `Ring` while a function is traced; everything else in the program is what users run.
"""

import contextlib
import functools
import re
import types
from collections import Counter
from unittest import mock

import jax
from jax import lax

from ringjax.attention import api
from ringjax.attention.ring import Ring


class Still(Ring):
    """A ring whose devices keep what they have."""

    def _rotate(self, x, step: int):
        # The barrier makes what stays a new value: hops over the same K and V could be merged into one.
        return jax.tree.map(lax.optimization_barrier, x)


@functools.cache  # a class each, so that one share's compiled program is not taken for another's
def share_of(rank: int) -> type[Ring]:
    """The ring as device `rank` sees it, with nothing arriving."""

    class Share(Still):
        def _group(self):
            return hidden(rank)

    return Share


def hidden(rank: int):
    """`rank` as a number that the compiler doesn't know, as it doesn't on a real ring."""
    return lax.optimization_barrier(jax.numpy.int32(rank))


@contextlib.contextmanager
def in_place_of_ring(ring: type[Ring]):
    """`rj.ring_attention` traced inside uses this class."""
    with mock.patch.object(api, "Ring", ring):
        yield


@contextlib.contextmanager
def as_device(rank: int, ring_size: int):
    """`rj.ring_attention` traced inside, outside any `shard_map`, is that of one device of a ring."""
    place = types.SimpleNamespace(**vars(lax))
    place.axis_size = lambda axis_name: ring_size
    place.axis_index = lambda axis_name: hidden(rank)
    with in_place_of_ring(share_of(rank)), mock.patch.object(api, "lax", place):
        yield


def work_in(program: str) -> Counter:
    """How many calls, products, loops and branches the HLO text of a program has: what Still must not change."""
    return Counter(re.findall(r"[\s)](custom-call|dot|while|conditional)\(", program))
