"""Generation: one prefill, then one compiled loop of a token at a time over the KV cache.

    hidden, cache = prefill(prompts)
    repeat:   token = sample(logits(hidden at the end));   hidden, cache = decode(token, cache)

Rows of one batch have prompts of different lengths. With guidance every prompt has a partner without the condition;
the two are neighbours in a batch of twice the size, and a token is sampled once for both.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ringjax.data.example import Example
from ringjax.inference.prefill import after, fill, prefill, prefill_shared, start
from ringjax.inference.prompts import PromptBatch, batch_prompts, seen_tokens
from ringjax.inference.sampling import Sampling, guide, row_keys, sample, step_keys
from ringjax.models.cache import KVCache
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training import distributed

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
    prefix: Example | None = None,
    parallel: Parallel = _ONE_DEVICE,
) -> list[Int[np.ndarray, " n"]]:
    """Text ids after each prompt: at most `max_new_tokens`, the one of `stop_ids` that ended it included.

    The loop ends when every row has stopped. `unconditional` holds each prompt without its condition, for
    `sampling.guidance` other than 1. `prefix` comes before every prompt; its keys and values exist once, however many
    prompts there are. Raises ValueError where arguments do not fit, NotImplementedError for a prefix with guidance or
    for a model with a window.
    """
    check_count("max_new_tokens", max_new_tokens)
    if prefix is not None and sampling.guidance != 1:
        raise NotImplementedError(f"a shared prefix and guidance {sampling.guidance}; put the prefix into the prompts")
    plan = Plan(max_new_tokens, stop_ids=tuple(int(i) for i in stop_ids))
    tokens = _generate(model, prompts, plan, sampling, unconditional, parallel, prefix)
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
    check_count("codes_per_frame", codes_per_frame)
    check_count("frames", frames)
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
    seen: Bool[Array, "B V"] | None
    """Tokens of the prompt and so far; None: nobody asks."""
    cache: KVCache


def _generate(
    model, prompts, plan: Plan, sampling: Sampling, unconditional, parallel: Parallel, prefix: Example | None = None
) -> np.ndarray:
    copies = _copies(sampling)
    rows = fill(_with_partners(prompts, unconditional, sampling), copies, parallel)
    graph, params, batch, capacity = start(model, rows, plan.new, parallel)
    seen = None
    if sampling.repetition_penalty != 1:
        vision = plan.codes_per_frame > 0
        size = model.config.vision_codes if vision else model.config.vocab_size
        seen = seen_tokens(rows[::copies], size, vision=vision)
        if prefix is not None:
            seen |= seen_tokens([prefix], size, vision=vision)
    shared = None
    if prefix is not None:
        shared, _ = batch_prompts([prefix] * parallel.size("dp", "fsdp"), 0, parallel)
    static = dict(graph=graph, plan=plan, sampling=sampling, capacity=capacity, parallel=parallel)
    tokens = _run(params, batch, shared, seen, **static)
    return distributed.fetch(tokens)[: len(prompts)]


def _copies(sampling: Sampling) -> int:
    """Rows of the batch for a prompt."""
    return 1 if sampling.guidance == 1 else 2


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
def _run(
    params, batch: PromptBatch, prefix: PromptBatch | None, seen, *, graph, plan: Plan, sampling: Sampling,
    capacity: int, parallel: Parallel,
) -> Int[Array, "prompts new"]:  # fmt: skip
    """The tokens; those after a stop are 0."""
    model = nnx.merge(graph, params)
    copies = _copies(sampling)
    rows = batch.tokens.shape[0] // copies
    next_token = _sampler(model, plan, sampling, rows, parallel)
    shared = None if prefix is None else prefill_shared(model, prefix, parallel)
    hidden, cache = prefill(model, batch, capacity, parallel, shared)

    def write(state: Loop, hidden: Float[Array, "C D"], cache) -> Loop:
        token = jnp.where(state.done, 0, next_token(hidden, state.step, state.seen))
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        done = state.done | jnp.isin(token, jnp.asarray(plan.stop_ids, jnp.int32))
        return Loop(state.step + 1, tokens, done, with_token(state.seen, token), cache)

    def body(state: Loop) -> Loop:
        last = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        new = jnp.repeat(last, copies, axis=0)
        modality = jnp.full(new.shape, plan.codes_per_frame > 0)
        positions = after(shared, state.cache.lengths[:, None])
        hidden, cache = model.decode(
            new, modality, positions, state.cache, parallel=parallel, prefix=None if shared is None else shared.prefix
        )
        return write(state, hidden[:, 0], cache)

    none = jnp.zeros((rows, plan.new), jnp.int32)
    state = write(Loop(jnp.int32(0), none, jnp.zeros(rows, bool), seen, cache), hidden, cache)
    return lax.while_loop(lambda s: (s.step < plan.new) & ~jnp.all(s.done), body, state).tokens


def _sampler(model: Transformer, plan: Plan, sampling: Sampling, rows: int, parallel: Parallel) -> Callable:
    """`next_token(hidden, step, seen)`: the token of each prompt from the stream's end, at a step of the plan."""
    config, codes = model.config, plan.codes_per_frame
    keys = row_keys(sampling, rows)
    head = model.vision_logits if codes else model.text_logits

    def next_token(hidden: Float[Array, "C D"], step, seen) -> Int[Array, " B"]:
        logits = parallel.constrain(head(hidden), "batch", None)
        if sampling.guidance != 1:
            logits = guide(logits[0::2], logits[1::2], sampling.guidance)
        now = step_keys(keys, step)
        if not codes:
            return sample(logits, now, sampling, seen)
        token = sample(logits[:, : config.vision_codes], now, sampling, seen)
        mark = jnp.where(step == plan.new - 1, config.end_of_vision, config.end_of_frame)
        return jnp.where(step % (codes + 1) == codes, mark, token)

    return next_token


def with_token(
    seen: Bool[Array, "B V"] | None, token: Int[Array, " B"], counts: Bool[Array, " B"] | bool = True
) -> Bool[Array, "B V"] | None:
    """`seen` with the token of each row that `counts`; one past its end (an end mark) never does."""
    if seen is None:
        return None
    return seen.at[jnp.arange(len(token)), jnp.where(counts, token, seen.shape[1])].set(True, mode="drop")


def _until_stop(row: Int[np.ndarray, " new"], stop_ids: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    stops = np.flatnonzero(np.isin(row, stop_ids))
    return row[: stops[0] + 1] if len(stops) else row


def check_count(name: str, value: int) -> None:
    """Raises ValueError for what is no number of things."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} {value!r} must be an integer of at least 1")
