"""How likely a model finds several answers to one prompt, which is read once; or what bears loss in whole rows.

    log p(answer | prompt) = Σ log p(token | the prompt and the answer's tokens before it)

    prompt   <s> <vision> 11 12 … 8193 </visio        its keys and values exist once, cut over the ring
    rows                                       n>  a  cat  </s>
                                               n>  two  red  dice  </s>

The last token of the prompt begins every row, so that a row's hidden states predict all of its answer. A model with a
window has no prefix that all tokens see: there every row holds the whole prompt.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ringjax.attention import Reach, layouts
from ringjax.data.example import Example
from ringjax.inference.prefill import after, fill, prefill_shared
from ringjax.inference.prompts import PromptBatch, append_text, batch_prompts
from ringjax.inference.room import require_room
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training import distributed
from ringjax.training.loss import token_nll

_ONE_DEVICE = Parallel()


class Likelihood:
    """Log-likelihoods of text answers, in nats, by a model on the devices of `parallel`."""

    def __init__(self, model: Transformer, parallel: Parallel = _ONE_DEVICE):
        self._graph, params = nnx.split(model)
        placed = parallel.mesh is not None
        self._params = jax.device_put(params, parallel.param_shardings(params)) if placed else params
        self._config, self._parallel = model.config, parallel

    def __call__(self, prompt: Example, answers: Sequence[Sequence[int]]) -> Float[np.ndarray, " answers"]:
        """log p of each answer (text ids, at least one) after the prompt.

        Raises ValueError for an empty prompt or answer, and for a prompt whose cache does not fit into memory.
        """
        empty = next((number for number, answer in enumerate(answers) if not len(answer)), None)
        if empty is not None:
            raise ValueError(f"answer {empty} has no tokens; give it some words")
        shares = self._config.window is None and len(prompt) > 1
        begin = _part(prompt, len(prompt) - 1, len(prompt)) if shares else prompt
        rows = [_learned(append_text(begin, answer), len(begin)) for answer in answers]
        return self._of(rows, self._shared(_part(prompt, 0, len(prompt) - 1)) if shares else None)

    def of(self, rows: Sequence[Example]) -> Float[np.ndarray, " rows"]:
        """log p of those tokens of each row that bear loss, text or vision, each after all tokens before it."""
        return self._of(list(rows), None)

    def _of(self, rows: list[Example], shared: PromptBatch | None) -> Float[np.ndarray, " rows"]:
        filled = fill(rows, 1, self._parallel)
        inputs, _ = batch_prompts([_part(row, 0, len(row) - 1) for row in filled], 0, self._parallel)
        targets = Targets(*(np.zeros(inputs.tokens.shape, dtype) for dtype in (np.int32, bool, bool)))
        for place, row in enumerate(filled):
            for whole, part in zip(targets, (row.tokens, row.modality, row.loss)):
                whole[place, : len(row) - 1] = part[1:]
        sums = _sums(self._params, shared, inputs, targets, graph=self._graph, parallel=self._parallel)
        return distributed.fetch(sums).astype(np.float64)[: len(rows)]

    def _shared(self, prefix: Example) -> PromptBatch:
        parallel = self._parallel
        batch, capacity = batch_prompts([prefix] * parallel.size("dp", "fsdp"), 0, parallel)
        require_room(self._config, len(batch.tokens), capacity, parallel, option="a shorter prompt")
        return batch


class Targets(NamedTuple):
    """The tokens after those of a batch, of which table they are, and which count."""

    tokens: Int[Array, "B T"]
    modality: Bool[Array, "B T"]
    active: Bool[Array, "B T"]


def _learned(example: Example, start: int) -> Example:
    """The example whose tokens from `start` on bear loss, and no others."""
    return dataclasses.replace(example, loss=np.arange(len(example)) >= start)


def _part(example: Example, start: int, stop: int) -> Example:
    ahead = None if example.ahead is None else example.ahead[start:stop]
    return Example(example.tokens[start:stop], example.modality[start:stop], example.loss[start:stop], ahead)


@functools.partial(jax.jit, static_argnames=("graph", "parallel"))
def _sums(
    params, shared: PromptBatch | None, rows: PromptBatch, targets: Targets, *, graph, parallel: Parallel
) -> Float[Array, " B"]:  # fmt: skip
    """Σ log p of each row's active targets."""
    model = nnx.merge(graph, params)
    prompt = None if shared is None else prefill_shared(model, shared, parallel)
    order, ring_size = layouts.get(parallel.layout), parallel.ring_size
    cut = lambda x: order.permute(x, ring_size, axis=1)  # noqa: E731
    place = cut(jnp.broadcast_to(jnp.arange(rows.size, dtype=jnp.int32), rows.tokens.shape))
    hidden, _ = model.prefill(
        cut(rows.tokens), cut(rows.modality), after(prompt, place),
        None if rows.ahead is None else Reach(place, cut(rows.ahead)), cache_length=rows.size, lengths=rows.lengths,
        parallel=parallel, prefix=None if prompt is None else prompt.prefix,
    )  # fmt: skip
    heads = (model.head_kernel("text"), None if model.vte is None else model.head_kernel("vision"))
    tokens, modality, active = map(cut, targets)
    nll = token_nll(heads, hidden, tokens, modality, active, parallel=parallel, chunk=model.config.loss_chunk)
    return -jnp.sum(nll, axis=1)
