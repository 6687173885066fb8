"""Text and pictures in one stream: the model itself opens `<vision>`, writes frames, ends them, and goes on in text.

The loop is that of `generate`, a token at a time over the KV cache; which ids a row's next token may be is the
grammar's matter, and rows of one batch may be in different places of it. A head is computed only where some row needs
it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ringjax.data.example import Example
from ringjax.inference.generate import check_count, with_token
from ringjax.inference.grammar import Grammar, State, advance, allowed_vision, forced_text, state_after
from ringjax.inference.pieces import Piece, split_pieces
from ringjax.inference.prefill import fill, prefill, start
from ringjax.inference.prompts import PromptBatch, seen_tokens
from ringjax.inference.sampling import Sampling, row_keys, sample, step_keys
from ringjax.models.cache import KVCache
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training import distributed

_ONE_DEVICE = Parallel()
_SAMPLE = Sampling()


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """What was generated after a prompt: ids with what each is (True: vision), and the same as pieces."""

    tokens: Int[np.ndarray, " n"]
    modality: Bool[np.ndarray, " n"]
    pieces: list[Piece]


def generate_interleaved(
    model: Transformer,
    prompts: Sequence[Example],
    *,
    max_new_tokens: int,
    codes_per_frame: int,
    vision_start: Sequence[int],
    vision_end: Sequence[int],
    max_frames: int | None = None,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = _SAMPLE,
    vision_sampling: Sampling | None = None,
    parallel: Parallel = _ONE_DEVICE,
) -> list[Written]:
    """At most `max_new_tokens` ids of text and vision after each prompt, the one of `stop_ids` that ended it included.

    Vision is opened by the text ids `vision_start`, the model's or the prompt's; after every `codes_per_frame` codes
    the model chooses whether the vision ends, and after `max_frames` frames it has to (None: no limit); then
    `vision_end` is put. A prompt may end anywhere, within a frame too. Vision ids are drawn by `vision_sampling`
    (None: as text). Raises ValueError where arguments do not fit, NotImplementedError for guidance.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("codes_per_frame", codes_per_frame)
    if model.vte is None:
        raise ValueError("this model draws no pictures: its config has vision_vocab_size 0; use generate_text")
    grammar = Grammar(
        tuple(map(int, vision_start)), tuple(map(int, vision_end)), codes_per_frame, model.config.end_of_frame,
        model.config.end_of_vision, max_frames,
    )  # fmt: skip
    rules = Rules(grammar, max_new_tokens, tuple(map(int, stop_ids)), sampling, vision_sampling or sampling)
    rules.check()
    rows = fill(list(prompts), 1, parallel)
    graph, params, batch, capacity = start(model, rows, max_new_tokens, parallel)
    tokens, modality, lengths = _run(
        params, batch, state_after(rows, grammar), _seen(model, rows, rules), graph=graph, rules=rules,
        capacity=capacity, parallel=parallel,
    )  # fmt: skip
    written = []
    for prompt, ids, vision, length in zip(prompts, *distributed.fetch((tokens, modality, lengths))):
        ids, vision = ids[:length], vision[:length]
        written.append(Written(ids, vision, split_pieces(prompt, ids, vision, grammar)))
    return written


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a compiled loop is made for."""

    grammar: Grammar
    new: int
    stop_ids: tuple[int, ...]
    text: Sampling
    vision: Sampling

    def check(self) -> None:
        """Raises for what has no meaning here."""
        for sampling in (self.text, self.vision):
            if sampling.guidance != 1:
                raise NotImplementedError(
                    f"guidance {sampling.guidance} has no meaning where the model says itself what it draws: no prompt"
                    " lacks the condition; use guidance 1, or generate_frames"
                )


class Loop(NamedTuple):
    """The state between two tokens: `step` of them are in `tokens`, all but the last one in the cache."""

    step: Int[Array, ""]
    tokens: Int[Array, "B new"]
    modality: Bool[Array, "B new"]
    lengths: Int[Array, " B"]
    done: Bool[Array, " B"]
    stream: State
    seen: tuple[Bool[Array, "B V"] | None, Bool[Array, "B C"] | None]
    cache: KVCache


def _seen(model: Transformer, rows: Sequence[Example], rules: Rules):
    """Text ids and codes of the prompts, each None where nothing is penalised for being repeated."""
    config = model.config
    wanted = (rules.text, config.vocab_size, False), (rules.vision, config.vision_codes, True)
    return tuple(
        None if sampling.repetition_penalty == 1 else seen_tokens(rows, size, vision=vision)
        for sampling, size, vision in wanted
    )


@functools.partial(jax.jit, static_argnames=("graph", "rules", "capacity", "parallel"))
def _run(params, batch: PromptBatch, stream: State, seen, *, graph, rules: Rules, capacity: int, parallel: Parallel):
    """Tokens and modality `[B, new]`, and how many of them each row has."""
    model = nnx.merge(graph, params)
    rows, new = batch.tokens.shape[0], rules.new
    keys = [row_keys(sampling, rows) for sampling in (rules.text, rules.vision)]
    hidden, cache = prefill(model, batch, capacity, parallel)

    def write(state: Loop, hidden: Float[Array, "B D"], cache: KVCache) -> Loop:
        at_step = [step_keys(of_rows, state.step) for of_rows in keys]
        vision = state.stream.in_vision & ~state.done
        token = jnp.where(state.done, 0, _next_token(model, hidden, state, at_step, rules, parallel))
        place = jnp.int32(0), state.step
        stopped = state.stream.in_text & jnp.isin(token, jnp.asarray(rules.stop_ids, jnp.int32))
        text_seen, codes_seen = state.seen
        return Loop(
            step=state.step + 1,
            tokens=lax.dynamic_update_slice(state.tokens, token[:, None], place),
            modality=lax.dynamic_update_slice(state.modality, vision[:, None], place),
            lengths=state.lengths + ~state.done,
            done=state.done | stopped,
            stream=advance(state.stream, token, rules.grammar),
            seen=(with_token(text_seen, token, ~vision), with_token(codes_seen, token, vision)),
            cache=cache,
        )

    def body(state: Loop) -> Loop:
        last = [lax.dynamic_slice_in_dim(x, state.step - 1, 1, axis=1) for x in (state.tokens, state.modality)]
        hidden, cache = model.decode(*last, state.cache.lengths[:, None], state.cache, parallel=parallel)
        return write(state, hidden[:, 0], cache)

    begin = Loop(
        step=jnp.int32(0), tokens=jnp.zeros((rows, new), jnp.int32), modality=jnp.zeros((rows, new), bool),
        lengths=jnp.zeros(rows, jnp.int32), done=jnp.zeros(rows, bool), stream=jax.tree.map(jnp.asarray, stream),
        seen=seen, cache=cache,
    )  # fmt: skip
    state = write(begin, hidden, cache)
    state = lax.while_loop(lambda s: (s.step < new) & ~jnp.all(s.done), body, state)
    return state.tokens, state.modality, state.lengths


def _next_token(model: Transformer, hidden, state: Loop, keys, rules: Rules, parallel: Parallel) -> Int[Array, " B"]:
    """The token of each row where it is in its stream; rows that are done get any."""
    stream, grammar = state.stream, rules.grammar
    text_seen, codes_seen = state.seen
    nothing = jnp.zeros(len(hidden), jnp.int32)

    def draw_text():
        logits = parallel.constrain(model.text_logits(hidden), "batch", None)
        return sample(logits, keys[0], rules.text, text_seen)

    def draw_vision():
        logits = parallel.constrain(model.vision_logits(hidden), "batch", None)
        size = logits.shape[1]
        # End marks are never held against the model: a clip has many.
        seen = None if codes_seen is None else jnp.pad(codes_seen, ((0, 0), (0, size - codes_seen.shape[1])))
        allowed = allowed_vision(stream, jnp.arange(size), grammar)
        return sample(jnp.where(allowed, logits, -jnp.inf), keys[1], rules.vision, seen)

    text = lax.cond(jnp.any(stream.in_text & ~state.done), draw_text, lambda: nothing)
    vision = lax.cond(jnp.any(stream.in_vision & ~state.done), draw_vision, lambda: nothing)
    return jnp.where(stream.in_vision, vision, jnp.where(stream.in_text, text, forced_text(stream, grammar)))
