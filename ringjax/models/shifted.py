"""Shifted sparse attention, S²-Attn of LongLoRA (Chen et al. 2023, arXiv:2309.12307), for training on long rows.

Half of the heads attend inside groups of G tokens, the other half inside groups that lie G/2 further on; what one half
cuts apart the other joins, so that layers hand on what they know. In our words it is two reaches, and all else stays:

    G = 4            document   0 1 2 3 4 5 6 7 8 9
    first heads      behind     0 1 2 3 0 1 2 3 0 1       min(behind, position mod G)
    other heads      behind     0 1 0 1 2 3 0 1 2 3       min(behind, (position + G/2) mod G)

Groups are counted in each document of a row by its tokens' positions, which travel with them: layout, ring and strategy
change nothing. (The paper's code rolls the sequence, so that the last half group sees the first one or is masked; here
it is a short group.) Inference uses full attention.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ringjax.attention import Reach
from ringjax.models.parallel import Parallel


def group_reach(reach: Reach | None, positions: Int[Array, "B T"], group: int, shift: int) -> Reach:
    """`reach` (None: causal) cut to groups of `group` tokens that begin `shift` tokens early."""
    place = (jnp.asarray(positions, jnp.int32) + shift) % group
    if shift:  # the first group of a document is what the shift left of it
        place = jnp.minimum(place, positions)
    if reach is None:
        return Reach(place, jnp.zeros_like(place), max_behind=group - 1, max_ahead=0)
    left = group - 1 - (positions + shift) % group
    most = group - 1 if reach.max_behind is None else min(reach.max_behind, group - 1)
    return dataclasses.replace(
        reach, behind=jnp.minimum(reach.behind, place), ahead=jnp.minimum(reach.ahead, left), max_behind=most,
        max_ahead=group - 1 if reach.max_ahead is None else min(reach.max_ahead, group - 1),
    )  # fmt: skip


def first_heads(heads: int, key_heads: int) -> tuple[int, int]:
    """How many query and key heads attend in groups that are not shifted: half of them, rounded up to whole key heads.

    A single key head serves both halves of the query heads.
    """
    if key_heads == 1:
        return heads // 2, 1
    first = (key_heads + 1) // 2
    return heads // key_heads * first, first


def shifted_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    reach: Reach | None,
    positions: Int[Array, "B T"],
    group: int,
    parallel: Parallel,
    **options,
) -> Float[Array, "B T N H"]:
    """`parallel.attend` in groups of `group` tokens; `options` are its own."""
    n, kept = first_heads(q.shape[2], k.shape[2])
    rest = 0 if k.shape[2] == 1 else kept
    halves = (q[:, :, :n], k[:, :, :kept], v[:, :, :kept]), (q[:, :, n:], k[:, :, rest:], v[:, :, rest:])
    reaches = (group_reach(reach, positions, group, shift) for shift in (0, group // 2))
    found = [parallel.attend(*half, cut, **options) for half, cut in zip(halves, reaches)]
    return jnp.concatenate(found, axis=2)
