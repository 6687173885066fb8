"""In which order rows of several sources are seen: any place of an endless order, computed from the seed alone.

    epoch e of n rows:   source s gives rows e·n_s … (e+1)·n_s of its own endless order, and all are shuffled together
    source s alone:      one permutation of its rows after the other

n_s is the number of its rows, or its share of n by weight: then a small source comes round several times an epoch.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


class PictureOrder:
    """`order.rows(start, count)` -> `[count, 2]` of source and row."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
        """`weights`: how often a source is seen relative to the others; None: as its number of rows says."""
        self._sizes, self._seed = tuple(sizes), seed
        total = sum(sizes)
        parts = np.asarray(sizes if weights is None else weights, np.float64)
        ends = np.round(np.cumsum(parts) / parts.sum() * total).astype(np.int64)
        self._counts = np.diff(ends, prepend=0)
        self.epoch_size = total
        # Of this object alone: a batch touches one epoch, or two.
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def rows(self, start: int, count: int) -> Int[np.ndarray, "count 2"]:
        """Places `start`, start + 1, … of the order."""
        places = np.arange(start, start + count)
        epochs, offsets = np.divmod(places, self.epoch_size)
        return np.stack([self._epoch(int(e))[o] for e, o in zip(epochs, offsets)])

    def _make_epoch(self, epoch: int) -> Int[np.ndarray, "n 2"]:
        parts = [
            np.stack([np.full(count, source), self._own_rows(source, epoch * count, count)], axis=1)
            for source, count in enumerate(self._counts.tolist())
        ]
        return np.random.default_rng((self._seed, 0, epoch)).permutation(np.concatenate(parts))

    def _own_rows(self, source: int, start: int, count: int) -> Int[np.ndarray, "count"]:
        size, found = self._sizes[source], []
        while count > 0:
            turn, offset = divmod(start, size)
            order = np.random.default_rng((self._seed, 1 + source, turn)).permutation(size)
            found.append(order[offset : offset + count])
            start, count = start + len(found[-1]), count - len(found[-1])
        return np.concatenate(found) if found else np.zeros(0, np.int64)
