"""One conversation: a cache that is kept between turns, filled in chunks, and read a token at a time."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from ringjax.attention import layouts
from ringjax.inference.sampling import Sampling, sample
from ringjax.models.cache import KVCache, widen
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer

_ONE_DEVICE = Parallel()
_AXES = ("layers", "batch", "sequence", "kv_heads", None)
CHUNK, SMALLEST = 512, 8
# The cache begins with room for so many tokens and doubles as it fills: a token costs what the cache holds.
FIRST_ROOM = 1024


class Session:
    """A text model with room for `capacity` tokens, cut over the ring of `parallel`.

    `ids` are the tokens in the cache. Raises ValueError where the layout cannot cut the capacity.
    """

    def __init__(self, model: Transformer, capacity: int, parallel: Parallel = _ONE_DEVICE, chunk: int = CHUNK):
        layouts.get(parallel.layout).validate(capacity, parallel.ring_size)
        self.parallel, self.capacity, self.chunk = parallel, capacity, chunk
        self.ids: list[int] = []
        self._graph, params = nnx.split(model)
        self._params = params if parallel.mesh is None else jax.device_put(params, parallel.param_shardings(params))
        movable = parallel.ring_size == 1 or parallel.layout == "striped"  # a longer shard keeps its tokens in place
        room = -(-FIRST_ROOM // parallel.ring_size) * parallel.ring_size  # each device's share is whole
        self._cache = _empty(model, min(capacity, room) if movable else capacity, parallel)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.ids = self.ids[:length]

    def feed(self, ids: Sequence[int]) -> None:
        """Puts tokens into the cache, `chunk` at a time. Raises ValueError where they do not fit."""
        self._require_room(len(ids))
        for first in range(0, len(ids), self.chunk):
            self._advance(ids[first : first + self.chunk], Sampling(temperature=0), 0)

    def generate(
        self, ids: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int] = (), sampling: Sampling
    ) -> Iterator[int]:
        """The tokens after `ids` (at least one), one at a time; the one of `stop_ids` that ends them included.

        All but the last one given are in the cache. It ends too where the cache is full. A token's random numbers
        depend on the seed and its place, not on how the tokens before it came into the cache.
        """
        if not ids:
            raise ValueError("nothing to go on from: give at least one token")
        whole = (len(ids) - 1) // self.chunk * self.chunk
        self._require_room(len(ids))
        self.feed(ids[:whole])
        pending, stops = list(ids[whole:]), frozenset(int(i) for i in stop_ids)
        for _ in range(max_new_tokens):
            if len(self.ids) + len(pending) > self.capacity:
                return
            token = int(self._advance(pending, sampling, len(self.ids) + len(pending)))
            yield token
            if token in stops:
                return
            pending = [token]

    def _require_room(self, count: int) -> None:
        if len(self.ids) + count > self.capacity:
            raise ValueError(
                f"{count} tokens after the {len(self.ids)} in the cache do not fit its {self.capacity}; ask for more"
                " with --context, or begin anew"
            )

    def _advance(self, ids: Sequence[int], sampling: Sampling, place: int):
        size = SMALLEST if len(ids) > 1 else 1
        while size < len(ids):
            size *= 2  # few sizes, so few programs
        tokens = jnp.asarray([[*ids, *[0] * (size - len(ids))]], jnp.int32)
        while self._cache.capacity < min(len(self.ids) + len(ids), self.capacity):
            self._cache = _grown(self._cache, min(2 * self._cache.capacity, self.capacity), self.parallel)
        # The cache's own count would include what fills up a chunk.
        cache = self._cache._replace(lengths=jnp.asarray([len(self.ids)], jnp.int32))
        token, self._cache = _step(
            self._params, cache, tokens, len(ids), place, graph=self._graph, sampling=sampling, parallel=self.parallel
        )
        self.ids += [int(i) for i in ids]
        return token


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "parallel"), donate_argnums=1)
def _step(params, cache: KVCache, tokens, count, place, *, graph, sampling: Sampling, parallel: Parallel):
    """The token after the first `count` of `tokens` `[1, T]`, which follow those in the cache; and the cache."""
    model = nnx.merge(graph, params)
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden, cache = model.decode(tokens, jnp.zeros(tokens.shape, bool), positions, cache, parallel=parallel)
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    key = jax.random.fold_in(jax.random.key(sampling.seed), place)
    return sample(model.text_logits(last), key[None], sampling)[0], cache


@functools.partial(jax.jit, static_argnames=("capacity", "parallel"))
def _grown(cache: KVCache, capacity: int, parallel: Parallel) -> KVCache:
    """The cache with room for more; no token changes its device."""
    wider = jax.vmap(lambda x: widen(x, capacity, parallel))
    return cache._replace(k=wider(cache.k), v=wider(cache.v))


def _empty(model: Transformer, capacity: int, parallel: Parallel) -> KVCache:
    config = model.config
    shape = (config.layers, 1, capacity, config.key_heads, config.head_size)
    sharding = None
    if parallel.mesh is not None:
        sharding = NamedSharding(parallel.mesh, parallel.spec_for(shape, *_AXES))
    zeros = jax.jit(lambda: jnp.zeros(shape, config.compute_dtype), out_shardings=sharding)
    return KVCache(zeros(), zeros(), jnp.zeros(1, jnp.int32))
