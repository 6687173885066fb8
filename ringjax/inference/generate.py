"""Generation: one prefill, then one compiled loop of a token at a time over the KV cache.

    hidden, cache = prefill(prompts)
    repeat:   token = sample(logits(hidden at the end));   hidden, cache = decode(token, cache)

Rows of one batch have prompts of different lengths. With guidance every prompt has a partner without the condition;
the two are neighbours in a batch of twice the size, and a token is sampled once for both.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ringjax.attention import Reach, layouts
from ringjax.data.example import Example
from ringjax.inference.prompts import PromptBatch, batch_prompts
from ringjax.inference.sampling import Sampling, guide, sample
from ringjax.models.cache import KVCache
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer, for_decoding

_ONE_DEVICE = Parallel()
_SAMPLE = Sampling()


def generate_text(
    model: Transformer,
    prompts: Sequence[Example],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = _SAMPLE,
    unconditional: Sequence[Example] | None = None,
    parallel: Parallel = _ONE_DEVICE,
) -> list[Int[np.ndarray, " n"]]:
    """Text ids after each prompt: at most `max_new_tokens`, the one of `stop_ids` that ended it included.

    The loop ends when every row has stopped. `unconditional` holds each prompt without its condition, for
    `sampling.guidance` other than 1. Raises ValueError where arguments do not fit.
    """
    _check_new("max_new_tokens", max_new_tokens)
    plan = Plan(max_new_tokens, stop_ids=tuple(int(i) for i in stop_ids))
    tokens = _generate(model, prompts, plan, sampling, unconditional, parallel)
    return [_until_stop(row, plan.stop_ids) for row in tokens]


def generate_frames(
    model: Transformer,
    prompts: Sequence[Example],
    *,
    codes_per_frame: int,
    frames: int = 1,
    sampling: Sampling = _SAMPLE,
    unconditional: Sequence[Example] | None = None,
    parallel: Parallel = _ONE_DEVICE,
) -> Int[np.ndarray, "B frames codes"]:
    """Codes of `frames` pictures after each prompt, which ends with `<vision>`.

    Only codes are sampled; after `codes_per_frame` of them the end mark of the frame (of the vision after the last
    frame) is put, as in LWM. Arguments as in `generate_text`.
    """
    _check_new("codes_per_frame", codes_per_frame)
    _check_new("frames", frames)
    if model.vte is None:
        raise ValueError("this model draws no pictures: its config has vision_vocab_size 0")
    plan = Plan(frames * (codes_per_frame + 1), codes_per_frame=codes_per_frame)
    tokens = _generate(model, prompts, plan, sampling, unconditional, parallel)
    return tokens.reshape(len(prompts), frames, codes_per_frame + 1)[:, :, :-1]


class Plan(NamedTuple):
    """What is generated: `new` tokens a row; pictures where `codes_per_frame` is above 0, otherwise text."""

    new: int
    stop_ids: tuple[int, ...] = ()
    codes_per_frame: int = 0


class Loop(NamedTuple):
    """The state between two tokens: `step` of them are in `tokens`, all but the last one in the cache."""

    step: Int[Array, ""]
    tokens: Int[Array, "B new"]
    done: Bool[Array, " B"]
    cache: KVCache


def _generate(model, prompts, plan: Plan, sampling: Sampling, unconditional, parallel: Parallel) -> np.ndarray:
    copies = _copies(sampling)
    rows = _fill(_with_partners(prompts, unconditional, sampling), copies, parallel)
    batch, capacity = batch_prompts(rows, plan.new, parallel)
    graph, params = nnx.split(for_decoding(model))
    if parallel.mesh is not None:
        params = jax.device_put(params, parallel.param_shardings(params))
    tokens = _run(params, batch, graph=graph, plan=plan, sampling=sampling, capacity=capacity, parallel=parallel)
    return np.asarray(tokens)[: len(prompts)]


def _copies(sampling: Sampling) -> int:
    """Rows of the batch for a prompt."""
    return 1 if sampling.guidance == 1 else 2


def _fill(rows: list[Example], copies: int, parallel: Parallel) -> list[Example]:
    """The rows, with as many copies of the last prompt (and its partner) as dp · fsdp needs."""
    replicas = parallel.size("dp", "fsdp")
    step = replicas // math.gcd(replicas, copies)
    missing = -(len(rows) // copies) % step
    return rows + rows[-copies:] * missing


def _with_partners(prompts, unconditional, sampling: Sampling) -> list[Example]:
    """The prompts; with guidance each is followed by its partner without the condition."""
    if sampling.guidance == 1:
        return list(prompts)
    if unconditional is None or len(unconditional) != len(prompts):
        found = "none" if unconditional is None else len(unconditional)
        raise ValueError(
            f"guidance {sampling.guidance} needs as many unconditional prompts as prompts ({len(prompts)}), not"
            f" {found}; give them, or use guidance 1"
        )
    return [row for pair in zip(prompts, unconditional) for row in pair]


@functools.partial(jax.jit, static_argnames=("graph", "plan", "sampling", "capacity", "parallel"))
def _run(params, batch: PromptBatch, *, graph, plan: Plan, sampling: Sampling, capacity: int, parallel: Parallel):
    """`[prompts, new]` tokens; those after a stop are 0."""
    model = nnx.merge(graph, params)
    copies = _copies(sampling)
    rows = batch.tokens.shape[0] // copies
    next_token = _sampler(model, plan, sampling, rows, parallel)
    hidden, cache = _prefill(model, batch, capacity, parallel)

    def write(state: Loop, hidden: Float[Array, "C D"], cache) -> Loop:
        token = jnp.where(state.done, 0, next_token(hidden, state.step))
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        done = state.done | jnp.isin(token, jnp.asarray(plan.stop_ids, jnp.int32))
        return Loop(state.step + 1, tokens, done, cache)

    def body(state: Loop) -> Loop:
        last = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        new = jnp.repeat(last, copies, axis=0)
        modality = jnp.full(new.shape, plan.codes_per_frame > 0)
        hidden, cache = model.decode(new, modality, state.cache.lengths[:, None], state.cache, parallel=parallel)
        return write(state, hidden[:, 0], cache)

    start = Loop(jnp.int32(0), jnp.zeros((rows, plan.new), jnp.int32), jnp.zeros(rows, bool), cache)
    state = write(start, hidden, cache)
    return lax.while_loop(lambda s: (s.step < plan.new) & ~jnp.all(s.done), body, state).tokens


def _prefill(model: Transformer, batch: PromptBatch, capacity: int, parallel: Parallel):
    """Hidden `[B, D]` of each prompt's last token, and the cache."""
    order, ring_size = layouts.get(parallel.layout), parallel.ring_size
    index = jnp.broadcast_to(jnp.arange(batch.size, dtype=jnp.int32), batch.tokens.shape)
    in_order = batch.tokens, batch.modality, index, batch.ahead
    tokens, modality, positions, ahead = (order.permute(x, ring_size, axis=1) for x in in_order)
    hidden, cache = model.prefill(
        tokens, modality, positions, Reach(positions, ahead), cache_length=capacity, lengths=batch.lengths,
        parallel=parallel,
    )  # fmt: skip
    at_end = positions == batch.lengths[:, None] - 1
    return jnp.sum(jnp.where(at_end[..., None], hidden, 0), axis=1), cache


def _sampler(model: Transformer, plan: Plan, sampling: Sampling, rows: int, parallel: Parallel) -> Callable:
    """`next_token(hidden, step)`: the token of each prompt from the stream's end, at a step of the plan."""
    config, codes = model.config, plan.codes_per_frame
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), jnp.arange(rows))
    head = model.vision_logits if codes else model.text_logits

    def next_token(hidden: Float[Array, "C D"], step) -> Int[Array, " B"]:
        logits = parallel.constrain(head(hidden), "batch", None)
        if sampling.guidance != 1:
            logits = guide(logits[0::2], logits[1::2], sampling.guidance)
        row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        if not codes:
            return sample(logits, row_keys, sampling)
        token = sample(logits[:, : config.vision_codes], row_keys, sampling)
        mark = jnp.where(step == plan.new - 1, config.end_of_vision, config.end_of_frame)
        return jnp.where(step % (codes + 1) == codes, mark, token)

    return next_token


def _until_stop(row: Int[np.ndarray, " new"], stop_ids: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    stops = np.flatnonzero(np.isin(row, stop_ids))
    return row[: stops[0] + 1] if len(stops) else row


def _check_new(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} {value!r} must be an integer of at least 1")
