"""Features of pictures in the places of tokens: which feature a place takes travels with the tokens.

    tokens   USER :  <image> <image> <image> \\n  What …        ids of one row
    index     −1  −1    0       1       2    −1   −1            of its features; −1: the token itself

The index is permuted as the tokens are, so a feature finds its place under every layout and in every shard.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ringjax.models.parallel import Parallel


class Features(NamedTuple):
    """`values` of each row, and for each token the `index` of the one in its place (−1: none), in layout order."""

    values: Float[Array, "B F D"]
    index: Int[Array, "B T"]


def feature_index(tokens: Int[np.ndarray, "B T"], image_token: int) -> Int[np.ndarray, "B T"]:
    """Features to the image tokens of each row, one after the other; `tokens` are in ascending order."""
    here = np.asarray(tokens) == image_token
    return np.where(here, np.cumsum(here, axis=1) - 1, -1).astype(np.int32)


def splice(embedded: Float[Array, "B T D"], features: Features, parallel: Parallel) -> Float[Array, "B T D"]:
    """`embedded` with the features in their places; an index past the last feature gives NaN, as an unknown token does.

    Raises ValueError where shapes or types do not fit.
    """
    values, index = features
    batch, length, width = embedded.shape
    if index.shape != (batch, length) or index.dtype.kind != "i":
        raise ValueError(f"features.index is {index.dtype}{list(index.shape)}; it must be integer {[batch, length]}")
    if values.ndim != 3 or values.shape[0] != batch or values.shape[2] != width:
        raise ValueError(f"features.values is {list(values.shape)}; it must be [B, F, D] = [{batch}, F, {width}]")
    with jax.named_scope("splice"):
        found = _pick(jnp.asarray(values, embedded.dtype), index, parallel)
        found = jnp.where((index >= values.shape[1])[..., None], jnp.nan, found)
        return jnp.where((index >= 0)[..., None], found, embedded)


def _pick(values: Float[Array, "B F D"], index: Int[Array, "B T"], parallel: Parallel) -> Float[Array, "B T D"]:
    """The feature of each index, 0 for others. Features go around the ring: no device ever holds all of them."""
    ring_size = parallel.ring_size
    values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % ring_size), (0, 0)))
    rows = parallel.spec_for(values.shape, "batch", "sequence", None)
    places = parallel.spec_for(index.shape, "batch", "sequence")
    out = parallel.spec_for((*index.shape, values.shape[2]), "batch", "sequence", None)
    local = functools.partial(_local_pick, ring_size=ring_size)
    return parallel.local(local, (rows, places), out)(values, index)


def _local_pick(values, index, ring_size: int):
    size, row = values.shape[1], jnp.arange(values.shape[0])[:, None]
    shard = lax.axis_index("sp") if ring_size > 1 else 0
    onward = [(i, (i + 1) % ring_size) for i in range(ring_size)]

    def take(found, visiting, hop):
        place = index - (shard - hop) % ring_size * size
        place = jnp.where((place >= 0) & (place < size), place, size)
        return found + visiting.at[row, place].get(mode="fill", fill_value=0)

    def step(carry, hop):
        found, visiting = carry
        sent = lax.ppermute(visiting, "sp", onward)  # on its way while this shard's are taken
        return (take(found, visiting, hop), sent), None

    found = jnp.zeros((*index.shape, values.shape[2]), values.dtype)
    if ring_size == 1:
        return take(found, values, 0)
    (found, values), _ = lax.scan(step, (found, values), jnp.arange(ring_size - 1))
    return take(found, values, ring_size - 1)
