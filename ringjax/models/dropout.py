"""Dropout that does not depend on the mesh, the layout or the micro-batches (Srivastava et al. 2014, JMLR 15:56).

    y = x · mask / (1 − rate)        mask ~ Bernoulli(1 − rate), drawn for each token from a key of its own

A token's key follows from the step's key, the token's row and its place in the sequence, so a token has the same mask
wherever it lies, and the backward pass draws it again in place of keeping it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ringjax.attention import layouts
from ringjax.models.parallel import Parallel

# Where in a block something is dropped; the embedding counts as a layer of its own.
EMBEDDING, ATTENTION, FEED_FORWARD = 0, 1, 2
_SITES = 3


class Dropout(NamedTuple):
    """What one pass through the model drops."""

    keys: Key[Array, "B T"]
    rate: float

    @classmethod
    def of(
        cls, rate: float, key: Key[Array, ""], first_row: Int[Array, ""] | int, batch: int, length: int,
        parallel: Parallel,
    ) -> "Dropout":  # fmt: skip
        """Of the rows `first_row` … of a global batch, `length` tokens each, in the layout order of `parallel`."""
        order = layouts.get(parallel.layout).permute(np.arange(length, dtype=np.int32), parallel.ring_size, axis=0)
        places = parallel.constrain(jnp.broadcast_to(jnp.asarray(order), (batch, length)), "batch", "sequence")
        rows = jax.vmap(functools.partial(jax.random.fold_in, key))(first_row + jnp.arange(batch, dtype=jnp.int32))
        return cls(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(rows, places), rate)

    def __call__(self, x: Float[Array, "B T D"], site: int, layer: Int[Array, ""] | int = 0) -> Float[Array, "B T D"]:
        """`x` with its share of zeros, the rest made larger by as much."""
        with jax.named_scope("dropout"):
            keys = _each(jax.random.fold_in, None)(self.keys, _SITES * layer + site)
            keep = _each(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[-1:]))(keys)
            return jnp.where(keep, x / jnp.asarray(1 - self.rate, x.dtype), 0)


def _each(function, *others):
    """`function` of every token's key; `others` are the axes of further arguments."""
    return jax.vmap(jax.vmap(function, (0, *others)), (0, *others))
