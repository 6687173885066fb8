"""How a generation begins: prompts as rows that the mesh can cut, room for the cache, and the prefill."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ringjax.attention import Reach, layouts
from ringjax.data.example import Example
from ringjax.inference.prompts import PromptBatch, batch_prompts
from ringjax.inference.room import require_room
from ringjax.models.cache import KVCache
from ringjax.models.parallel import Parallel
from ringjax.models.prefix import Prefix
from ringjax.models.transformer import Transformer, for_decoding


class Shared(NamedTuple):
    """A prefix of so many tokens that all prompts begin with."""

    prefix: Prefix
    length: Int[Array, ""]


class Start(NamedTuple):
    """What the compiled loop takes: the model in two parts, the prompts, and how long the cache is."""

    graph: nnx.GraphDef
    params: Any
    batch: PromptBatch
    capacity: int


def start(model: Transformer, rows: Sequence[Example], new: int, parallel: Parallel) -> Start:
    """Prompts and parameters where they belong, for `new` tokens after each row.

    Raises ValueError for an empty prompt, and for a cache that does not fit into memory.
    """
    batch, capacity = batch_prompts(rows, new, parallel)
    require_room(model.config, len(rows), capacity, parallel, option="a shorter prompt or --max_new_tokens")
    graph, params = nnx.split(for_decoding(model))
    if parallel.mesh is not None:
        params = jax.device_put(params, parallel.param_shardings(params))
    return Start(graph, params, batch, capacity)


def fill(rows: list[Example], copies: int, parallel: Parallel) -> list[Example]:
    """The rows, with as many copies of the last `copies` ones (a prompt and its partner) as dp · fsdp needs."""
    replicas = parallel.size("dp", "fsdp")
    step = replicas // math.gcd(replicas, copies)
    missing = -(len(rows) // copies) % step
    return rows + rows[-copies:] * missing


def prefill(
    model: Transformer, batch: PromptBatch, capacity: int, parallel: Parallel, shared: Shared | None = None
) -> tuple[Float[Array, "B D"], KVCache]:
    """Hidden state of each prompt's last token, and the cache; the prompts go on after what is `shared`."""
    order, ring_size = layouts.get(parallel.layout), parallel.ring_size
    place = jnp.broadcast_to(jnp.arange(batch.size, dtype=jnp.int32), batch.tokens.shape)
    cut = lambda x: order.permute(x, ring_size, axis=1)  # noqa: E731
    place, prefix = cut(place), None if shared is None else shared.prefix
    # Where nobody looks ahead the mask is causal, which is known without data: the fastest kernels serve it.
    reach = None if batch.ahead is None else Reach(place, cut(batch.ahead))
    hidden, cache = model.prefill(
        cut(batch.tokens), cut(batch.modality), after(shared, place), reach, cache_length=capacity,
        lengths=batch.lengths, parallel=parallel, prefix=prefix,
    )  # fmt: skip
    at_end = place == batch.lengths[:, None] - 1
    return jnp.sum(jnp.where(at_end[..., None], hidden, 0), axis=1), cache


def prefill_shared(model: Transformer, batch: PromptBatch, parallel: Parallel) -> Shared:
    """What all prompts begin with, computed once."""
    _, cache = prefill(model, batch, batch.size, parallel)
    return Shared(Prefix.of(cache, model.config), batch.lengths[0])


def after(shared: Shared | None, place: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The positions of tokens from their places in a row of its own."""
    return place if shared is None else place + shared.length
