"""How a generation begins: prompts as rows that the mesh can cut, room for the cache, and the prefill."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ringjax.attention import Reach, layouts
from ringjax.data.example import Example
from ringjax.inference.prompts import PromptBatch, batch_prompts
from ringjax.inference.room import require_room
from ringjax.models.cache import KVCache
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer, for_decoding


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
    model: Transformer, batch: PromptBatch, capacity: int, parallel: Parallel
) -> tuple[Float[Array, "B D"], KVCache]:
    """Hidden state of each prompt's last token, and the cache."""
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
