"""Prompts of different lengths as one batch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ringjax.attention import layouts
from ringjax.data.example import Example
from ringjax.models.parallel import Parallel

# Prompts are padded to a multiple of this many tokens, so that those of about one length share a compiled program.
_BUCKET = 16


class PromptBatch(NamedTuple):
    """Prompts side by side, padded at the end, in ascending order of the sequence."""

    tokens: Int[np.ndarray, "B T"]
    modality: Bool[np.ndarray, "B T"]
    ahead: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]

    @property
    def size(self) -> int:
        """T, the padded length."""
        return self.tokens.shape[1]


def text_prompt(tokens: Sequence[int]) -> Example:
    """A prompt of text ids."""
    ids = np.asarray(tokens, np.int32)
    return Example(ids, np.zeros(len(ids), bool), np.zeros(len(ids), bool))


def append_text(prompt: Example, tokens: Sequence[int]) -> Example:
    """The prompt with text ids after it."""
    more = text_prompt(tokens)
    ahead = None if prompt.ahead is None else np.concatenate([prompt.ahead, np.zeros(len(more), np.int32)])
    joined = (np.concatenate([getattr(prompt, f), getattr(more, f)]) for f in ("tokens", "modality", "loss"))
    return Example(*joined, ahead)


def batch_prompts(prompts: Sequence[Example], new: int, parallel: Parallel) -> tuple[PromptBatch, int]:
    """The prompts as a batch that `parallel` can cut, and the capacity of a cache for them and `new` tokens.

    Raises ValueError where there is no prompt, or an empty one.
    """
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    empty = next((i for i, prompt in enumerate(prompts) if len(prompt) == 0), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} is empty; begin it with the tokenizer's begin token at least")
    longest = max(map(len, prompts))
    length, capacity = _room(longest, new, parallel)
    batch = PromptBatch(
        tokens=np.zeros((len(prompts), length), np.int32),
        modality=np.zeros((len(prompts), length), bool),
        ahead=np.zeros((len(prompts), length), np.int32),
        lengths=np.array([len(prompt) for prompt in prompts], np.int32),
    )
    for row, prompt in enumerate(prompts):
        batch.tokens[row, : len(prompt)] = prompt.tokens
        batch.modality[row, : len(prompt)] = prompt.modality
        if prompt.ahead is not None:
            batch.ahead[row, : len(prompt)] = prompt.ahead
    return batch, capacity


def _room(longest: int, new: int, parallel: Parallel) -> tuple[int, int]:
    """Tokens of the prefill, and of the cache."""
    ring_size = parallel.ring_size
    multiple = math.lcm(_BUCKET, 2 * ring_size)
    length = math.ceil(longest / multiple) * multiple
    capacity = math.ceil((longest + new) / multiple) * multiple
    layouts.get(parallel.layout).validate(capacity, ring_size)
    if ring_size > 1 and parallel.layout != "striped":
        length = capacity  # in other layouts tokens would change shards when the cache is longer than the prefill
    return length, capacity
