"""One conversation: a cache that is kept between turns, filled in chunks, and read a token at a time.

    first chunk      ring attention: K and V go around, the cache is cut as the tokens are
    later chunks     the cache stays where it is: every device attends with all queries of the chunk to its own part,
                     and the parts are merged (pass-Q; Yang et al. 2024, arXiv:2411.01783)
    a token          the same with one query

A model with a window keeps `sinks + window` tokens and what has not been cleared away yet: its cache does not grow.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ringjax.attention import layouts
from ringjax.attention.kernels.base import target
from ringjax.inference.room import require_room, with_whole_weights
from ringjax.inference.sampling import Sampling, sample
from ringjax.models.cache import CacheType, KVCache, empty_cache, widen, without
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer, for_decoding
from ringjax.training import distributed

_ONE_DEVICE = Parallel()
# Tokens of a chunk on each device; on CPUs, whose attention computes what a mask hides, of all.
CHUNK, CPU_CHUNK, SMALLEST = 32768, 512, 8
# Slots of a device's share come in so many: the kernels' copies take no other number.
ROOM_MULTIPLE = 8
# Tokens that an accelerator writes between two words with the host; on CPUs the host does the work anyway.
BURST = 8
# A first chunk this long goes through ring attention.
RING_FROM = 64
# The cache begins with room for so many tokens and grows as it fills: where no kernel skips what is empty, a token
# costs what the cache has room for.
FIRST_ROOM = 1024


class Session:
    """A text model with room for `capacity` tokens, cut over the ring of `parallel`.

    `ids` are the tokens that it has read. Raises ValueError where the layout cannot cut the capacity, or where the
    cache would not fit into memory, which `option` is there to ask less of.
    """

    def __init__(
        self,
        model: Transformer,
        capacity: int,
        parallel: Parallel = _ONE_DEVICE,
        chunk: int | None = None,
        cache_type: CacheType | None = None,
        *,
        option: str = "--context",
    ):
        layouts.get(parallel.layout).validate(capacity, parallel.ring_size)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk {chunk} must be at least 1 token, or None for the session's own choice")
        on_cpu = target().platform == "cpu"
        self.parallel, self.capacity = parallel, capacity
        self.chunk = chunk or (CPU_CHUNK if on_cpu else CHUNK * parallel.ring_size)
        if chunk is None and model.config.window is not None:
            self.chunk = min(self.chunk, max(CPU_CHUNK, model.config.window))
        self.ids: list[int] = []
        self._vocab_size = model.config.vocab_size
        self._dropped = 0  # tokens that a window has left behind and the cache has no more
        self._lead, self._burst = (0, 1) if on_cpu else (1, BURST)
        # A longer shard keeps its tokens in place.
        self._movable = parallel.ring_size == 1 or parallel.layout == "striped"
        # One row cannot be shared out between groups of devices: there the first chunk is one like the others.
        self._ring = self._movable and parallel.size("dp", "fsdp") == 1
        self._room = self._most_room(model.config)
        first = _rounded(FIRST_ROOM, ROOM_MULTIPLE * parallel.ring_size)
        most = self._room if self._movable else capacity
        graph, params = nnx.split(for_decoding(model))
        if parallel.mesh is not None:
            parallel = with_whole_weights(params, model.config, most, parallel, cache_type)
            params = jax.device_put(params, parallel.param_shardings(params))
        # As a list: to take hundreds of variables apart for every token takes longer than the token.
        self._params, tree = jax.tree.flatten(params)
        self._shape = _Shape(graph, tree, parallel, cache_type)
        require_room(model.config, 1, most, parallel, option=option, cache_type=cache_type)
        self._cache = empty_cache(model.config, 1, min(most, first) if self._movable else most, parallel, cache_type)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values, on all devices together."""
        return sum(array.nbytes for array in jax.tree.leaves(self._cache))

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` tokens; gives how many are left: none where a window has dropped those
        that the next token would see."""
        if self._dropped and length - self._window < self._dropped + self._sinks:
            length = 0
        self.ids = self.ids[:length]
        self._dropped = min(self._dropped, length)
        return length

    def feed(self, ids: Sequence[int]) -> None:
        """Puts tokens into the cache, `chunk` at a time. Raises ValueError where they do not fit."""
        self._require_room(len(ids))
        self.reserve(len(ids))
        for first in range(0, len(ids), self.chunk):
            part = ids[first : first + self.chunk]
            self._advance(part, Sampling(temperature=0))
            self.ids += [int(i) for i in part]

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
        self.reserve(len(ids) + max_new_tokens)
        self.feed(ids[:whole])
        stops = frozenset(int(i) for i in stop_ids)
        most = min(max_new_tokens, self.capacity - len(self.ids) - (len(ids) - whole) + 1)
        seen = self._seen(ids[whole:]) if sampling.repetition_penalty != 1 else None
        token = self._advance(ids[whole:], sampling, seen)
        self.ids += [int(i) for i in ids[whole:]]
        yield from self._go_on(token, most, stops, sampling, seen)

    def adopt(
        self, ids: Sequence[int], cache: KVCache, token: jax.Array, *, max_new_tokens: int,
        stop_ids: Sequence[int] = (), sampling: Sampling,
    ) -> Iterator[int]:  # fmt: skip
        """As `generate`, where somebody else has filled a `cache` of one row with `ids` (pictures, say) and found the
        first token `[1, 1]` after them."""
        self.ids, self._dropped, self._cache = [int(i) for i in ids], 0, cache
        most = min(max_new_tokens, self.capacity - len(ids) + 1)
        seen = self._seen([]) if sampling.repetition_penalty != 1 else None
        yield from self._go_on(token, most, frozenset(int(i) for i in stop_ids), sampling, seen)

    def _go_on(self, token: jax.Array, most: int, stops: frozenset, sampling: Sampling, seen) -> Iterator[int]:
        """`token` `[1, 1]` and those after it."""
        tokens = token
        while True:
            place, left = len(self.ids) + tokens.shape[1] - 1, most - tokens.shape[1]
            more = functools.partial(self._write, token, place, sampling, seen)
            # From the device to the device: the next step does not wait for the host to see the tokens.
            ahead = more() if self._lead and left > 0 else None
            *read, last = distributed.fetch(tokens)[0].tolist()
            for value in read:  # the device has read these already
                yield value
                most -= 1
                if value in stops or most == 0:
                    return
                self.ids.append(value)
            yield last
            most -= 1
            if last in stops or most == 0:
                return
            tokens, token, seen = more() if ahead is None else ahead
            self.ids.append(last)

    def _seen(self, more: Sequence[int]) -> jax.Array:
        """`[1, V]`: the tokens so far and `more`, which a repetition penalty is for."""
        seen = np.zeros((1, self._vocab_size), bool)
        seen[0, np.asarray([*self.ids, *more], np.int64)] = True
        return jnp.asarray(seen)

    def _require_room(self, count: int) -> None:
        if len(self.ids) + count > self.capacity:
            raise ValueError(
                f"{count} tokens after the {len(self.ids)} in the cache do not fit its {self.capacity}; ask for more"
                " with --context, or begin anew"
            )

    def _write(self, token: jax.Array, place: int, sampling: Sampling, seen: jax.Array | None):
        """The tokens `[1, n]` after `token`, which stands at `place`; the last of them; `seen` with what was read."""
        room = self._room - (place - self._dropped)
        count = self._burst if self._window is None and room >= self._burst else 1
        self._make_room(place, count)
        numbers = np.array([place, place - self._dropped], np.int32)
        tokens, token, self._cache, seen = _burst(
            self._shape, sampling, count, self._params, self._cache, token, numbers, seen
        )
        return tokens, token, seen

    def _advance(self, ids: Sequence[int], sampling: Sampling, seen: jax.Array | None = None) -> jax.Array:
        """Reads tokens after `self.ids`, which it leaves to the caller; gives the next one, `[1, 1]`."""
        count = len(ids)
        self._make_room(len(self.ids), count)
        start, kept = len(self.ids), len(self.ids) - self._dropped
        numbers = np.array([start, kept, count], np.int32)
        if not self.ids and count >= RING_FROM and self._ring:
            order, ring_size = layouts.get(self.parallel.layout), self.parallel.ring_size
            tokens = order.permute(_padded(ids, self._size(count)), ring_size, axis=1)
            capacity = max(self._cache.capacity, tokens.shape[1])
            self._cache = None  # its memory serves the new one
            token, self._cache = _prefill(self._shape, sampling, capacity, self._params, tokens, numbers, seen)
            return token
        tokens = _padded(ids, self._size(count))
        token, self._cache = _step(self._shape, sampling, self._params, self._cache, tokens, numbers, seen)
        return token

    def reserve(self, count: int) -> None:
        """Space for `count` more tokens, at once rather than as they come."""
        needed = min(len(self.ids) - self._dropped + count, self._room)
        if self._cache.capacity < needed:
            self._cache = _grown(self._cache, min(self._room, self._size(needed)), self.parallel)

    def _make_room(self, start: int, count: int) -> None:
        """Space for tokens after the first `start`: a larger cache up to the most; then what a window has left behind
        goes."""
        self.reserve(start - len(self.ids) + count)
        if start - self._dropped + count > self._room:
            ring_size = self.parallel.ring_size
            gone = (start - self._dropped - self._sinks - (self._window - 1)) // ring_size * ring_size
            self._cache = _without(self._cache, self._sinks, gone, parallel=self.parallel)
            self._dropped += gone

    def _most_room(self, config) -> int:
        """Tokens that the cache holds at most. A window's are kept for one more window, or chunk, so that clearing
        away costs little."""
        self._window, ring_size = config.window, self.parallel.ring_size
        self._sinks = _rounded(config.sinks, ring_size)  # each device keeps as many
        most = _rounded(self.capacity, ROOM_MULTIPLE * ring_size) if self._movable else self.capacity
        if self._window is None or not self._movable:
            return most
        room = self._sinks + self._window + max(self._window, self.chunk) + 2 * ring_size
        return min(most, _rounded(room, ROOM_MULTIPLE * ring_size))

    def _size(self, count: int) -> int:
        """A round number of at least `count` tokens: few sizes, so few programs, and little that only fills up."""
        if count == 1:
            return 1
        size = SMALLEST
        while size < count:
            size *= 2
        if size > 16 * SMALLEST:  # in between: 5, 6 and 7 eighths
            size = next(size * part // 8 for part in (5, 6, 7, 8) if size * part // 8 >= count)
        return _rounded(size, ROOM_MULTIPLE * self.parallel.ring_size)


class _Shape:
    """What of a model is no array, so that programs are found again; it is compared for every token."""

    def __init__(self, graph, tree, parallel: Parallel, cache_type: CacheType | None):
        self.parallel, self.cache_type, self._parts = parallel, cache_type, (graph, tree, parallel, cache_type)
        self._graph, self._tree, self._hash = graph, tree, hash(self._parts)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (isinstance(other, _Shape) and self._parts == other._parts)

    def model(self, params: list[jax.Array]) -> Transformer:
        """The model with these arrays."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, params))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(shape: _Shape, sampling: Sampling, params, cache: KVCache, tokens, numbers, seen):
    """The token after the first `count` of `tokens` `[1, T]`, which stand at `start` and follow the `kept` ones in the
    cache; and the cache. `numbers` are start, kept and count: the cache's own length would include what fills up."""
    model, (start, kept, count) = shape.model(params), numbers
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    cache = cache._replace(lengths=kept[None])
    hidden, cache = model.decode(tokens, jnp.zeros(tokens.shape, bool), positions, cache, parallel=shape.parallel)
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    return _drawn(model, last, start + count, sampling, seen), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(shape: _Shape, sampling: Sampling, capacity: int, params, tokens, numbers, seen):
    """`_step` for an empty cache, by ring attention; `tokens` are in layout order."""
    model, parallel, count = shape.model(params), shape.parallel, numbers[2]
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = layouts.get(parallel.layout).permute(index, parallel.ring_size, axis=1)
    hidden, cache = model.prefill(
        tokens, jnp.zeros(tokens.shape, bool), positions, cache_length=capacity, parallel=parallel,
        cache_type=shape.cache_type,
    )  # fmt: skip
    last = jnp.sum(jnp.where((positions == count - 1)[..., None], hidden, 0), axis=1)
    return _drawn(model, last, count, sampling, seen), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 7))
def _burst(shape: _Shape, sampling: Sampling, count: int, params, cache: KVCache, token, numbers, seen):
    """`count` tokens `[1, count]` after `token` `[1, 1]`, which stands at `place` and follows the `kept` ones in the
    cache; the last of them, for the next call; the cache; and `seen` with the tokens that were read."""
    model, (place, kept) = shape.model(params), numbers

    def write(index, state):
        token, cache, seen, written = state
        seen = None if seen is None else seen.at[0, token[0, 0]].set(True)
        position = jnp.reshape(place + index, (1, 1))
        hidden, cache = model.decode(token, jnp.zeros((1, 1), bool), position, cache, parallel=shape.parallel)
        token = _drawn(model, hidden[:, 0], place + index + 1, sampling, seen)
        return token, cache, seen, jax.lax.dynamic_update_slice(written, token, (0, index))

    state = token, cache._replace(lengths=kept[None]), seen, jnp.zeros((1, count), jnp.int32)
    token, cache, seen, written = jax.lax.fori_loop(0, count, write, state)
    return written, token, cache, seen


def _drawn(model: Transformer, last, place, sampling: Sampling, seen) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(sampling.seed), place)
    return sample(model.text_logits(last), key[None], sampling, seen)[None]


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded(ids: Sequence[int], size: int) -> np.ndarray:
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens


@functools.partial(jax.jit, static_argnames=("capacity", "parallel"))
def _grown(cache: KVCache, capacity: int, parallel: Parallel) -> KVCache:
    """The cache with room for more; no token changes its device."""
    wider = jax.vmap(lambda x: widen(x, capacity, parallel))
    return cache.with_arrays(map(wider, cache.arrays))


_without = jax.jit(without, static_argnames=("first", "parallel"), donate_argnums=0)
