"""The any-to-any transformer of LWM (Liu et al. 2024, arXiv:2402.08268): LLaMA blocks, two tables, two heads.

Parameters are named as in LWM: `wte`, `vte`, `h/{attention/{wq,wk,wv,wo}, feed_forward/{w1,w2,w3}, attention_norm,
ffn_norm}`, `ln_f`, `lm_head`, `vision_head`. Those under `h` are stacked along a leading layers axis.
"""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ringjax.attention import Reach
from ringjax.attention.kernels.base import target
from ringjax.models.cache import CacheType, KVCache, append_and_attend, check_capacity, filled
from ringjax.models.config import ModelConfig
from ringjax.models.dropout import ATTENTION, EMBEDDING, FEED_FORWARD, Dropout
from ringjax.models.features import Features, splice
from ringjax.models.feed_forward import FeedForward
from ringjax.models.layers import Embedding, Linear, RMSNorm, look_up, stacked
from ringjax.models.parallel import Parallel
from ringjax.models.prefix import Prefix, with_prefix
from ringjax.models.remat import PROJECTIONS, rematerialise
from ringjax.models.rope import rotate, rotations
from ringjax.models.shifted import shifted_attend
from ringjax.models.sinks import sink_positions, with_sinks

_ONE_DEVICE = Parallel()


class Rotations(NamedTuple):
    """Cosines and sines by which a token's queries and keys turn, and by which its queries of the sinks do."""

    positions: Int[Array, "B T"]
    own: tuple[Array, Array]
    to_sinks: tuple[Array, Array] | None

    @classmethod
    def of(cls, positions: Int[Array, "B T"], config: ModelConfig) -> "Rotations":
        """Those of a model."""
        turn = functools.partial(
            rotations, head_dim=config.head_size, theta=config.rope_theta, scaling=config.rope_scaling
        )
        to_sinks = turn(sink_positions(positions, config)) if config.sinks else None
        return cls(positions, turn(positions), to_sinks)


class SelfAttention(nnx.Module):
    """Queries, keys and values with RoPE, and the projection of what attention returns."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        queries, keys = config.heads * config.head_size, config.key_heads * config.head_size
        bias = config.qkv_bias
        self.wq = Linear(config.width, queries, ("embed", "heads"), config, rngs, bias)
        self.wk = Linear(config.width, keys, ("embed", "kv_heads"), config, rngs, bias)
        self.wv = Linear(config.width, keys, ("embed", "kv_heads"), config, rngs, bias)
        self.wo = Linear(queries, config.width, ("heads", "embed"), config, rngs)

    def project(self, x: Float[Array, "B T D"], rope: "Rotations", parallel: Parallel):
        """q `[B, T, N, H]` and k `[B, T, K, H]`, both rotated, v, and the q that looks at the sinks (None: none)."""
        q = self._split(self.wq(x, parallel), "heads", parallel)
        k = self._split(self.wk(x, parallel), "kv_heads", parallel)
        v = self._split(self.wv(x, parallel), "kv_heads", parallel)
        q_sinks = None if rope.to_sinks is None else rotate(q, *rope.to_sinks)
        return rotate(q, *rope.own), rotate(k, *rope.own), v, q_sinks

    def output(self, attended: Float[Array, "B T N H"], parallel: Parallel) -> Float[Array, "B T D"]:
        """The heads joined and projected."""
        return self.wo(attended.reshape(*attended.shape[:2], -1), parallel)

    def _split(self, x: Float[Array, "B T I"], axis: str, parallel: Parallel):
        heads = x.reshape(*x.shape[:2], -1, self.config.head_size)
        return parallel.constrain(heads, "batch", "sequence", axis, None)


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config.width, config)
        self.attention = SelfAttention(config, rngs)
        self.ffn_norm = RMSNorm(config.width, config)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rope: "Rotations", reach: Reach | None, parallel: Parallel,
        prefix: Prefix | None = None, layer: Int[Array, ""] | int = 0, dropout: Dropout | None = None,
    ):  # fmt: skip
        """The block's output, and its keys (rotated) and values; `layer` is its place in `prefix` and `dropout`."""
        config = self.config
        with jax.named_scope("attention"):
            q, k, v, q_sinks = self.attention.project(self.attention_norm(x), rope, parallel)
            q, k, v = (checkpoint_name(y, name) for y, name in zip((q, k, v), PROJECTIONS))
            options = dict(window=config.window, softcap=config.softcap)
            if config.shifted_group is not None and prefix is None:
                attended = shifted_attend(q, k, v, reach, rope.positions, config.shifted_group, parallel, **options)
            elif q_sinks is None and prefix is None:
                attended = parallel.attend(q, k, v, reach, **options)
            else:
                seen = parallel.attend(q, k, v, reach, return_lse=True, **options)
                if prefix is None:
                    attended = with_sinks(*seen, q_sinks, k, v, rope.positions, config=config, parallel=parallel)
                else:
                    attended = with_prefix(*seen, q, prefix, layer, softcap=config.softcap, parallel=parallel)
            added = _dropped(self.attention.output(attended, parallel), dropout, ATTENTION, layer)
            x = checkpoint_name(x + added, "attended_stream")
        return self._feed(x, parallel, layer, dropout), (k, v)

    def decode(
        self, x: Float[Array, "B T D"], rope: "Rotations", cache: KVCache, layer, parallel: Parallel,
        prefix: Prefix | None = None,
    ):  # fmt: skip
        """The same for T new tokens after those in the cache, as its layer `layer`; gives the cache with them."""
        config = self.config
        with jax.named_scope("attention"):
            q, k, v, q_sinks = self.attention.project(self.attention_norm(x), rope, parallel)
            attended, lse, cache = append_and_attend(
                q, k, v, cache, layer, parallel=parallel, window=config.window, softcap=config.softcap,
                sinks=config.sinks, q_sinks=q_sinks,
            )  # fmt: skip
            if prefix is not None:
                attended = with_prefix(attended, lse, q, prefix, layer, softcap=config.softcap, parallel=parallel)
            x = x + self.attention.output(attended, parallel)
        return self._feed(x, parallel), cache

    def _feed(self, x, parallel: Parallel, layer=0, dropout: Dropout | None = None):
        with jax.named_scope("feed_forward"):
            x = x + _dropped(self.feed_forward(self.ffn_norm(x), parallel), dropout, FEED_FORWARD, layer)
        return parallel.constrain(x, "batch", "sequence", None)


class Transformer(nnx.Module):
    """Text and vision tokens in one stream; see `ModelConfig`.

    `tokens` are ids in the table that `modality` says (True: vision), `positions` are what RoPE turns by and `reach` is
    what each token sees (None: causal). All are `[B, T]`, in the layout order of `parallel`. `features` are vectors
    that stand where tokens would (LLaVA's pictures).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.wte = Embedding(config.vocab_size, config, rngs)
        self.h = stacked(lambda rngs: Block(config, rngs), config.layers, rngs)
        self.ln_f = RMSNorm(config.width, config)
        vision, tied = config.vision_vocab_size > 0, config.tie_embeddings
        self.vte = Embedding(config.vision_vocab_size, config, rngs) if vision else None
        self.lm_head = None if tied else _head(config.vocab_size, config, rngs)
        self.vision_head = _head(config.vision_vocab_size, config, rngs) if vision and not tied else None

    @classmethod
    def abstract(cls, config: ModelConfig) -> Self:
        """The model with shapes in place of arrays: nothing is allocated."""
        return nnx.eval_shape(lambda: cls(config, nnx.Rngs(0)))

    @classmethod
    def create(cls, config: ModelConfig, seed: int, parallel: Parallel = _ONE_DEVICE) -> Self:
        """The model with fresh parameters, each made where it lives. They do not depend on the mesh."""
        graph, state = nnx.split(cls.abstract(config))
        shardings = None if parallel.mesh is None else parallel.param_shardings(state)
        make = jax.jit(lambda key: nnx.state(cls(config, nnx.Rngs(params=key))), out_shardings=shardings)
        return nnx.merge(graph, make(jax.random.key(seed)))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        modality: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
        reach: Reach | None = None,
        *,
        features: Features | None = None,
        parallel: Parallel = _ONE_DEVICE,
        dropout: Dropout | None = None,
    ) -> Float[Array, "B T D"]:
        """The final norm's output. Memory is linear in T: no logits, nothing T × T. Only training has `dropout`."""
        x, _ = self._through(
            tokens, modality, positions, reach, features, parallel, keep=lambda k, v: None, dropout=dropout
        )
        return self.ln_f(x)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        modality: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
        reach: Reach | None = None,
        *,
        cache_length: int,
        lengths: Int[Array, " B"] | None = None,
        features: Features | None = None,
        parallel: Parallel = _ONE_DEVICE,
        cache_type: CacheType | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """`hidden`, and the cache of the first `lengths` `[B]` tokens (None: all T) with room for `cache_length`.

        Rows of different lengths are padded at the end: new tokens overwrite the padding's slots. After a `prefix`
        that all rows share, `positions` go on where it ends, and the cache holds what comes after it.
        """
        batch, length = tokens.shape
        check_capacity(length, cache_length, parallel)
        x, (k, v, *scales) = self._through(
            tokens, modality, positions, reach, features, parallel,
            keep=lambda k, v: filled(k, v, cache_length, parallel, cache_type), prefix=prefix,
        )  # fmt: skip
        lengths = jnp.full((batch,), length, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
        return self.ln_f(x), KVCache(k, v, lengths, *scales)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        modality: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: KVCache,
        *,
        parallel: Parallel = _ONE_DEVICE,
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """`hidden` of T new tokens after those in the cache (in ascending order), and the cache with them."""
        tokens, modality, positions = _checked(tokens, modality, positions)
        rope = Rotations.of(positions, self.config)
        x = self._embed(tokens, modality, parallel)
        if not isinstance(self.h, Block):
            for layer, block in enumerate(self.h):
                x, cache = block.decode(x, rope, cache, jnp.int32(layer), parallel, prefix)
        else:
            graph, blocks = nnx.split(self.h)

            def step(carry, layer):
                (x, cache), (state, index) = carry, layer
                return nnx.merge(graph, state).decode(x, rope, cache, index, parallel, prefix), None

            # The caches are carried, not scanned over: what a scan takes and gives, it copies.
            layers = blocks, jnp.arange(self.config.layers, dtype=jnp.int32)
            (x, cache), _ = lax.scan(step, (x, cache), layers)
        return self.ln_f(x), cache._replace(lengths=cache.lengths + tokens.shape[1])

    def text_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of the text head, for a few tokens; training's `cross_entropy` never holds them all."""
        return _logits(hidden, self.head_kernel("text"))

    def vision_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of the vision head, for a few tokens."""
        return _logits(hidden, self.head_kernel("vision"))

    def head_kernel(self, modality: str) -> Float[Array, "D V"]:
        """The matrix of the 'text' or 'vision' head; the transposed table where embeddings are tied."""
        if modality == "vision" and self.vte is None:
            raise ValueError("this model has no vision head: its config has vision_vocab_size 0")
        head, table = (self.lm_head, self.wte) if modality == "text" else (self.vision_head, self.vte)
        return table.embedding[...].T if head is None else head.whole

    def _through(
        self, tokens, modality, positions, reach, features, parallel: Parallel, keep, prefix=None, dropout=None
    ):
        """The stream after all blocks, and what `keep` makes of every block's keys and values, stacked."""
        tokens, modality, positions = _checked(tokens, modality, positions)
        rope = Rotations.of(positions, self.config)
        x = _dropped(self._embed(tokens, modality, parallel, features), dropout, EMBEDDING)

        def attend(block, x, layer):
            x, (k, v) = block(x, rope, reach, parallel, prefix, layer, dropout)
            return x, keep(k, v)

        if not isinstance(self.h, Block):
            return _one_by_one(attend, x, self.h)
        graph, blocks = nnx.split(self.h)
        unroll = min(self.config.unroll, self.config.layers)
        block = rematerialise(
            lambda x, layer: attend(nnx.merge(graph, layer[0]), x, layer[1]), self.config.remat, parallel,
            unrolled=unroll > 1,
        )  # fmt: skip
        plain = prefix is None and dropout is None
        index = None if plain else jnp.arange(self.config.layers, dtype=jnp.int32)
        return lax.scan(block, x, (blocks, index), unroll=unroll)

    def _embed(self, tokens, modality, parallel: Parallel, features: Features | None = None) -> Float[Array, "B T D"]:
        if features is not None:  # what stands where a feature goes is no token of either table
            token = features.index < 0
            embedded = self._embed(jnp.where(token, tokens, 0), modality & token, parallel)
            return splice(embedded, features, parallel)
        dtype = self.config.compute_dtype
        with jax.named_scope("embed"):
            if self.vte is None:
                text_only = jnp.where(modality, -1, tokens)  # a vision token here is an error: it becomes NaN
                return look_up(self.wte.embedding[...], text_only, jnp.ones_like(modality), dtype, parallel)
            text = look_up(self.wte.embedding[...], tokens, ~modality, dtype, parallel)
            return text + look_up(self.vte.embedding[...], tokens, modality, dtype, parallel)


def _dropped(x, dropout: Dropout | None, site: int, layer=0):
    return x if dropout is None else dropout(x, site, layer)


def _checked(tokens, modality, positions):
    """The three as jax arrays; raises ValueError where a shape or type does not fit."""
    for name, x, kind in (("tokens", tokens, "i"), ("modality", modality, "b"), ("positions", positions, "i")):
        if x.ndim != 2 or x.shape != tokens.shape or x.dtype.kind != kind:
            what = "bool (True: vision)" if kind == "b" else "integer"
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; it must be {what} [B, T] = {list(tokens.shape)}")
    return jnp.asarray(tokens), jnp.asarray(modality), jnp.asarray(positions)


def _one_by_one(attend, x, blocks):
    """A scan over blocks that are not stacked; what they keep is written where it stays, so that it exists once."""
    kept = None
    for layer, block in enumerate(blocks):
        x, new = attend(block, x, jnp.int32(layer))
        if layer == 0:
            kept = jax.tree.map(lambda y: jnp.zeros((len(blocks), *y.shape), y.dtype), new)
        kept = jax.tree.map(lambda whole, y: whole.at[layer].set(y), kept, new)  # noqa: B023
    return x, kept


def _head(vocab_size: int, config: ModelConfig, rngs: nnx.Rngs) -> Linear:
    return Linear(config.width, vocab_size, ("embed", "vocab"), config, rngs)


def _logits(hidden, kernel):
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,dv->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=wide)


def for_decoding(model: Transformer) -> Transformer:
    """`unstacked` where it is faster, otherwise the model itself."""
    return unstacked(model) if isinstance(model.h, Block) and target().platform == "gpu" else model


def unstacked(model: Transformer) -> Transformer:
    """The same model with the parameters of each layer apart, for decoding on GPUs, where XLA copies what a product
    takes out of a stacked array: the weights would be read three times for each token. Compiling takes longer, for the
    layers are no scan. It is for inference: nothing is computed again in a backward pass."""
    graph, stacked = nnx.split(model.h)

    def layer(state, index: int):
        cut = lambda leaf: leaf.replace(leaf.get_value()[index], axes=leaf.get_metadata()["axes"][1:])  # noqa: E731
        return jax.tree.map(cut, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    states = jax.jit(lambda state: [layer(state, index) for index in range(model.config.layers)])(stacked)
    apart = nnx.merge(*nnx.split(model))
    apart.h = nnx.List([nnx.merge(graph, state) for state in states])
    return apart


def with_config(model: Transformer, **changes) -> Transformer:
    """The same parameters under a config with `changes` that alter no shape (rope_theta, remat, chunks, …)."""
    config, stacked = dataclasses.replace(model.config, **changes), isinstance(model.h, Block)

    def changed() -> Transformer:
        made = Transformer(config, nnx.Rngs(0))
        return made if stacked else unstacked(made)

    return nnx.merge(nnx.graphdef(nnx.eval_shape(changed)), nnx.state(model))
