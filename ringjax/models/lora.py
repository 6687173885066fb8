"""Low-rank adapters on linear layers (Hu et al. 2021, arXiv:2106.09685).

    y = x · W + s · (x · A) · B        A [in, r], B [r, out], s = alpha / r    (rsLoRA: alpha / √r, arXiv:2312.03732)

W stays as it is; only A and B are trained, and with `also` norms and tables (LongLoRA, arXiv:2309.12307, which found
them needed for longer contexts). B begins as zeros, so that a model with new adapters is the model. `merged` puts
s · A · B into W: no layer more, at inference. The model with adapters is not changed by it, so there is always a way
back that is exact; `unmerged` is the way back from a merged model alone, exact to the rounding of its type.
"""

import dataclasses
import fnmatch
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ringjax.models.config import ModelConfig
from ringjax.models.layers import Linear, LowRank
from ringjax.models.transformer import Transformer

Path = tuple[str, ...]
Also = Literal["norms", "embeddings"]
# The last parts of paths, by what `also` calls them. With tied embeddings a table is a head too.
_ALSO: dict[str, tuple[str, ...]] = {
    "norms": ("attention_norm", "ffn_norm", "ln_f"), "embeddings": ("wte", "vte")
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers get adapters, of which rank, and what else is trained."""

    rank: int = 8
    """r."""
    alpha: float = 16.0
    """Of the scale alpha / rank."""
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo")
    """Linear layers by name or pattern: wq wk wv wo w1 w2 w3 lm_head vision_head, or paths such as h.attention.*."""
    rank_stabilised: bool = False
    """Whether the scale is alpha / √rank."""
    also: tuple[Also, ...] = ()
    """What is trained whole beside the adapters: norms, embeddings."""
    dropout: float = 0.0
    """Of the adapters' inputs: only 0; the model's own `dropout` drops what its layers add, adapters included."""

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank {self.rank!r} must be a whole number of at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha} must be a finite number above 0")
        if not self.targets:
            raise ValueError("targets is empty; name at least one linear layer, such as wq")
        if self.dropout != 0:
            raise ValueError(
                f"lora.dropout {self.dropout} of the adapters' inputs is not here; use 0, and model.dropout, which"
                " drops what layers add, adapters included"
            )
        unknown = next((name for name in self.also if name not in _ALSO), None)
        if unknown is not None:
            raise ValueError(f"also {unknown!r} is not one of {', '.join(_ALSO)}")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def target_paths(model: Transformer, lora: LoraConfig) -> list[Path]:
    """The paths of the linear layers that the config names, sorted.

    Raises ValueError for a name that no layer has.
    """
    linear = sorted(path for path, module in nnx.iter_modules(model) if isinstance(module, Linear))
    found = {pattern: [path for path in linear if _matches(path, pattern)] for pattern in lora.targets}
    empty = next((pattern for pattern, paths in found.items() if not paths), None)
    if empty is not None:
        names = ", ".join(dict.fromkeys(".".join(path) for path in linear))
        raise ValueError(f"lora.targets {empty!r} is no linear layer of this model; there are {names}")
    return sorted({path for paths in found.values() for path in paths})


def _matches(path: Path, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path[-1], pattern) or fnmatch.fnmatchcase(".".join(path), pattern)


def with_adapters(model: Transformer, lora: LoraConfig, rngs: nnx.Rngs) -> Transformer:
    """The model with new adapters, which change nothing yet; they are float32 whatever the model's type is.

    A is uniform in ±1/√in, as in PEFT. The parameters are shared with `model`.
    """
    adapted = nnx.merge(*nnx.split(model))
    modules = dict(nnx.iter_modules(adapted))
    for path in target_paths(adapted, lora):
        linear = modules[path]
        *stack, inputs, outputs = linear.kernel.get_value().shape
        *layers, into, out = linear.kernel.get_metadata()["axes"]
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(rngs.params(), (*stack, inputs, lora.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, lora.rank, outputs), jnp.float32)
        a, b = nnx.Param(a, axes=(*layers, into, "rank")), nnx.Param(b, axes=(*layers, "rank", out))
        linear.low_rank = LowRank(a, b, lora.scale)
    return adapted


def abstract(config: ModelConfig, lora: LoraConfig) -> Transformer:
    """The model with adapters, with shapes in place of arrays."""
    return nnx.eval_shape(lambda: with_adapters(Transformer(config, nnx.Rngs(0)), lora, nnx.Rngs(0)))


def is_trained(path: Path, lora: LoraConfig) -> bool:
    """Whether a parameter is one that the run changes: an adapter's, or what `also` names."""
    also = {name for kind in lora.also for name in _ALSO[kind]}
    return "low_rank" in path or any(part in also for part in path)


def also_count(config: ModelConfig, lora: LoraConfig) -> int:
    """How many of the model's own parameters `also` trains."""
    counts = {
        "norms": (2 * config.layers + 1) * config.width,
        "embeddings": (config.vocab_size + config.vision_vocab_size) * config.width,
    }
    return sum(counts[kind] for kind in set(lora.also))


def new_trained(config: ModelConfig, lora: LoraConfig, kept: dict[Path, Any], seed) -> Any:
    """What a run with new adapters trains, float32: the adapters, and the `kept` parameters that `also` names."""
    model = with_adapters(Transformer(config, nnx.Rngs(0)), lora, nnx.Rngs(params=jax.random.key(seed)))
    trained, _ = split_trained(nnx.state(model), lora)
    flat = [(path, kept.get(path, leaf)) for path, leaf in nnx.to_flat_state(trained)]
    return jax.tree.map(lambda x: x.astype(jnp.float32), nnx.from_flat_state(flat))


def split_trained(state: Any, lora: LoraConfig) -> tuple[Any, Any]:
    """The parameters of a model with adapters as those that are trained and those that are frozen."""
    flat = list(nnx.to_flat_state(state))
    trained = [(path, leaf) for path, leaf in flat if is_trained(path, lora)]
    frozen = [(path, leaf) for path, leaf in flat if not is_trained(path, lora)]
    return nnx.from_flat_state(trained), nnx.from_flat_state(frozen)


def joined(trained: Any, frozen: Any) -> Any:
    """The inverse of `split_trained`."""
    return nnx.from_flat_state([*nnx.to_flat_state(trained), *nnx.to_flat_state(frozen)])


def merged(model: Transformer) -> Transformer:
    """A model of the same maths without adapters: `W + s · A · B` in W's type. `model` stays as it is."""
    return _without_adapters(model, lambda kernel, delta: kernel + delta)


def unmerged(model: Transformer, adapted: Transformer) -> Transformer:
    """What `merged(adapted)` was made from, given the merged `model`: `W − s · A · B`, to the rounding of W's type."""
    plain = dict(nnx.to_flat_state(nnx.state(model)))
    flat = [(path, plain.get(path, leaf)) for path, leaf in nnx.to_flat_state(nnx.state(adapted))]
    together = nnx.merge(nnx.graphdef(adapted), nnx.from_flat_state(flat))
    return _without_adapters(together, lambda kernel, delta: kernel - delta)


def _without_adapters(model: Transformer, change) -> Transformer:
    graph, state = nnx.split(model)
    found = nnx.merge(graph, jax.tree.map(lambda x: x, state))  # variables of its own: `model` stays as it is
    for _, module in list(nnx.iter_modules(found)):
        if isinstance(module, Linear) and module.low_rank is not None:
            kernel = module.kernel[...]
            wide = jnp.promote_types(kernel.dtype, jnp.float32)
            module.kernel[...] = change(kernel.astype(wide), module.low_rank.delta).astype(kernel.dtype)
            module.low_rank = nnx.data(None)
    return found
