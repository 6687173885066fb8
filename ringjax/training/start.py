"""A run that begins with a published model: what its config takes over from it, and the parameters.

Reading other projects' files is `ringjax.interop`'s, which hands an opener in:

    open_start(path, heads) -> Start        None where `path` is no published model (a run's folder)

What the model does not have (the tables of pictures of a text model) is drawn new, each number of a row from the normal
distribution that this component has over the rows of the text table: new tokens enter the stream, and leave it, as loud
as the old ones, and nothing that was learned changes.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer

SHAPES = (
    "width", "ffn_width", "layers", "heads", "key_heads", "head_size", "vocab_size", "tie_embeddings", "qkv_bias",
    "norm_eps",
)  # fmt: skip
"""What a config must have as the model has it; the rest may be changed."""
INHERITED = (
    "width", "ffn_width", "layers", "heads", "kv_heads", "head_dim", "vocab_size", "vision_vocab_size", "rope_theta",
    "rope_scaling", "norm_eps", "tie_embeddings", "qkv_bias", "window",
)  # fmt: skip
"""What a config that leaves it out takes over."""
# The tables and heads of pictures, and those of text whose rows they resemble.
_ALIKE = {("vte", "embedding"): ("wte", "embedding"), ("vision_head", "kernel"): ("lm_head", "kernel")}
_TOKENS = {("vte", "embedding"): 0, ("vision_head", "kernel"): 1}


@dataclasses.dataclass(frozen=True)
class Start:
    """A published model that a run begins with."""

    path: Path
    config: ModelConfig
    load: Callable[[ModelConfig, Parallel], Transformer]
    """With its parameters, streamed to their shards; the config is `config` but for what changes no shape."""
    fingerprint: str
    """Of its files."""
    has_tokenizer: bool = True
    unknown: tuple[str, ...] = ()
    """Fields of the config that the file does not tell."""

    @property
    def inherited(self) -> dict[str, Any]:
        """Fields of a config that leaves them out."""
        fields = dataclasses.asdict(self.config)
        return {name: fields[name] for name in INHERITED if name not in self.unknown}

    def check(self, config: ModelConfig) -> list[str]:
        """A line for each field of a run's config that does not fit the model."""
        pairs = [(name, getattr(config, name), getattr(self.config, name)) for name in SHAPES]
        if self.config.vision_vocab_size:
            pairs.append(("vision_vocab_size", config.vision_vocab_size, self.config.vision_vocab_size))
        return [f"model.{name} {ours!r} is {theirs!r} in {self.path}" for name, ours, theirs in pairs if ours != theirs]


OpenStart = Callable[[str, int | None], Start | None]
"""A path, and the heads where a file doesn't tell them."""


def open_published(path: str, heads: int | None, open_start: OpenStart | None) -> Start | None:
    """The published model at `path`; None for a run's folder. Raises ValueError where nobody can read it."""
    if open_start is not None:
        return open_start(path, heads)
    if Path(path).is_file() or (Path(path) / "config.json").is_file():
        raise ValueError(f"init_from {path} is a published model: pass open_start=ringjax.interop.start.open_start")
    return None


def first_params(start: Start, config: ModelConfig, parallel: Parallel, seed: int) -> tuple[Any, list[str]]:
    """The parameters of `config` from a published model, where they live, and what to say about them.

    Raises ValueError for a config that does not fit it.
    """
    if problems := start.check(config):
        raise ValueError("; ".join(problems))
    known = config if start.config.vision_vocab_size else dataclasses.replace(config, vision_vocab_size=0)
    found = dict(nnx.to_flat_state(nnx.state(start.load(known, parallel))))
    said = [f"parameters from {start.path}"]
    abstract = nnx.state(Transformer.abstract(config))
    placed = None if parallel.mesh is None else dict(nnx.to_flat_state(parallel.param_shardings(abstract)))
    leaves = []
    for number, (path, leaf) in enumerate(nnx.to_flat_state(abstract)):
        if path not in found:
            key = jax.random.fold_in(jax.random.key(seed), number)
            model = found[_ALIKE[path]].get_value()
            draw = functools.partial(drawn_like, shape=leaf.get_value().shape, axis=_TOKENS[path])
            place = None if placed is None else placed[path].get_value()
            value = jax.jit(draw, out_shardings=place)(model, key)
            found[path] = leaf.replace(value)
            scale = float(jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32)))))
            said.append(f"{'/'.join(path)} {list(value.shape)} is new, spread as the text's (RMS {scale:.3g})")
        leaves.append((path, found[path]))
    return nnx.from_flat_state(leaves), said


def drawn_like(table: Float[Array, "..."], key: PRNGKeyArray, *, shape: tuple[int, ...], axis: int) -> Array:
    """An array of `shape` whose components are spread as those of the tokens of `table`, which lie along `axis`."""
    wide = table.astype(jnp.float32)
    mean, spread = jnp.mean(wide, axis, keepdims=True), jnp.std(wide, axis, keepdims=True)
    return (mean + spread * jax.random.normal(key, shape, jnp.float32)).astype(table.dtype)
