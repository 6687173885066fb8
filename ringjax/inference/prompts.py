"""Prompts of different lengths as one batch."""

import dataclasses
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
    ahead: Int[np.ndarray, "B T"] | None
    """Tokens after its own that a token sees; None: nobody looks ahead."""
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
    return _joined(prompt, text_prompt(tokens))


def append_vision(
    prompt: Example, clip: Int[np.ndarray, "frames codes"], end_of_frame: int, *, ends: bool = True
) -> Example:
    """The prompt with the frames of a picture or clip after it, each with its end mark.

    `end_of_frame` follows every frame, but the next id the last one where the vision `ends` with it.
    """
    marks = np.full((len(clip), 1), end_of_frame, np.int32)
    marks[-1] += ends
    ids = np.concatenate([np.asarray(clip, np.int32), marks], axis=1).ravel()
    vision = Example(ids, np.ones(len(ids), bool), np.zeros(len(ids), bool))
    return _joined(prompt, vision)


def drawn_after(prompt: Example, clip: Int[np.ndarray, "frames codes"], end_of_frame: int) -> Example:
    """The prompt and a picture or clip that is drawn after it: its codes and end marks bear loss, nothing else does."""
    whole = append_vision(prompt, clip, end_of_frame)
    return dataclasses.replace(whole, loss=np.arange(len(whole)) >= len(prompt))


def _joined(first: Example, second: Example) -> Example:
    """One after the other; `second` sees nothing ahead."""
    ahead = None if first.ahead is None else np.concatenate([first.ahead, np.zeros(len(second), np.int32)])
    joined = (np.concatenate([getattr(first, f), getattr(second, f)]) for f in ("tokens", "modality", "loss"))
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
        ahead=None if all(p.ahead is None for p in prompts) else np.zeros((len(prompts), length), np.int32),
        lengths=np.array([len(prompt) for prompt in prompts], np.int32),
    )
    for row, prompt in enumerate(prompts):
        batch.tokens[row, : len(prompt)] = prompt.tokens
        batch.modality[row, : len(prompt)] = prompt.modality
        if prompt.ahead is not None:
            batch.ahead[row, : len(prompt)] = prompt.ahead
    return batch, capacity


def seen_tokens(prompts: Sequence[Example], size: int, *, vision: bool) -> Bool[np.ndarray, "B V"]:
    """Which of the first `size` ids each prompt holds, of text or of vision: what a repetition penalty is for."""
    seen = np.zeros((len(prompts), size), bool)
    for row, prompt in zip(seen, prompts):
        ids = prompt.tokens[prompt.modality == vision]
        row[ids[ids < size]] = True
    return seen


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
