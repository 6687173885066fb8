"""A smoothed bigram model: what a language model must beat to have learned more than which token follows which."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)


def bigram_chances(
    documents: Sequence[Int[np.ndarray, " n"]], vocab_size: int, strength: float
) -> Float[np.ndarray, "V V"]:
    """`P(b | a)` of every pair, by Dirichlet smoothing towards the single-token chances (MacKay & Peto 1995).

    P(b | a) = (count(a, b) + strength · P(b)) / (count(a) + strength),   P(b) = (count(b) + 1) / (all + V)
    """
    pairs = np.zeros((vocab_size, vocab_size))
    for ids in documents:
        np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    single = pairs.sum(axis=0) + 1
    single /= single.sum()
    return (pairs + strength * single) / (pairs.sum(axis=1, keepdims=True) + strength)


def bigram_loss(
    train: Sequence[Int[np.ndarray, " n"]], heldout: Sequence[Int[np.ndarray, " n"]], vocab_size: int
) -> float:
    """Nats a token on `heldout` of the bigram model counted on `train`.

    Of several smoothing strengths the one that is best on the held-out text itself counts: a choice in the bigram
    model's favour.
    """
    losses = []
    for strength in STRENGTHS:
        chances = bigram_chances(train, vocab_size, strength)
        losses.append(np.mean(np.concatenate([-np.log(chances[ids[:-1], ids[1:]]) for ids in heldout])))
    return float(min(losses))
