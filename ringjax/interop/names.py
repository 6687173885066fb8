"""One table: what our parameters are called in other projects, and how they lie there.

Ours are kernels `[in, out]`, stacked over the layers, with RoPE's pairs side by side (components 2i and 2i + 1).
Hugging Face's are `[out, in]`, a tensor a layer, and pair component i of a head with component H/2 + i:

    Hugging Face   a0 a1 a2 a3 b0 b1 b2 b3      rows of q and k, one head of 8
    ours           a0 b0 a1 b1 a2 b2 a3 b3
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from einops import rearrange
from jaxtyping import Int

from ringjax.interop.tensors import Index, TensorSource
from ringjax.models.config import ModelConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A parameter of ours from tensors of a source: one, or one a layer.

    `shape` is that of each tensor; `transposed`: ours is its transpose; `heads`: the outputs are so many rotated heads
    whose halves are split, so they change places.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    transposed: bool = False
    heads: int | None = None

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Of our parameter."""
        one = self.shape[::-1] if self.transposed else self.shape
        return (len(self.names), *one) if self.stacked else one

    def read(self, source: TensorSource, index: Index) -> np.ndarray:
        """The part of our parameter at `index`."""
        if not self.stacked:
            return self._one(source, self.names[0], index)
        return np.stack([self._one(source, name, index[1:]) for name in self.names[index[0]]])

    def write(self, kernel: np.ndarray) -> np.ndarray:
        """The source's tensor from one of ours (one layer of a stack)."""
        kernel = kernel.T if self.transposed else kernel
        return kernel[halves_split(self.shape[0], self.heads)] if self.heads else kernel

    def _one(self, source: TensorSource, name: str, index: Index) -> np.ndarray:
        index = index[::-1] if self.transposed else index
        part = self._rows(source, name, index) if self.heads else source.read(name, index)
        return part.T if self.transposed else part

    def _rows(self, source: TensorSource, name: str, index: Index) -> np.ndarray:
        """Rows in our order: those between the first and the last that are wanted are read, then put in place."""
        rows = pairs_joined(self.shape[0], self.heads)[index[0]]
        first = int(rows.min())
        return source.read(name, (slice(first, int(rows.max()) + 1), *index[1:]))[rows - first]


def pairs_joined(size: int, heads: int) -> Int[np.ndarray, " size"]:
    """The row of split halves that each row of joined pairs comes from."""
    return rearrange(np.arange(size), "(heads half pair) -> (heads pair half)", heads=heads, half=2)


def halves_split(size: int, heads: int) -> Int[np.ndarray, " size"]:
    """The inverse of `pairs_joined`."""
    return rearrange(np.arange(size), "(heads pair half) -> (heads half pair)", heads=heads, half=2)


def recipes(config: ModelConfig, layer_name: Callable[[int, str], str], outer: dict[str, str], inner: dict[str, str],
            *, split_halves: bool) -> dict[Path, Recipe]:  # fmt: skip
    """The recipe of every parameter of a text model.

    `outer` and `inner` name tensors outside and inside the layers by our paths, joined with '/'; `layer_name(i, name)`
    is the whole name in layer i.
    """
    q, kv, width, hidden = _sizes(config)
    q_heads, k_heads = (config.heads, config.key_heads) if split_halves else (None, None)
    layers = {
        "attention/wq/kernel": ((q, width), True, q_heads),
        "attention/wk/kernel": ((kv, width), True, k_heads),
        "attention/wv/kernel": ((kv, width), True, None),
        "attention/wo/kernel": ((width, q), True, None),
        "feed_forward/w1/kernel": ((hidden, width), True, None),
        "feed_forward/w2/kernel": ((width, hidden), True, None),
        "feed_forward/w3/kernel": ((hidden, width), True, None),
        "attention_norm/kernel": ((width,), False, None),
        "ffn_norm/kernel": ((width,), False, None),
    }
    if config.qkv_bias:
        layers |= {
            "attention/wq/bias": ((q,), False, q_heads),
            "attention/wk/bias": ((kv,), False, k_heads),
            "attention/wv/bias": ((kv,), False, None),
        }
    found = {}
    for path, (shape, transposed, heads) in layers.items():
        names = tuple(layer_name(i, inner[path]) for i in range(config.layers))
        found["h", *path.split("/")] = Recipe(names, shape, True, transposed, heads)
    table = config.vocab_size, width
    found["wte", "embedding"] = Recipe((outer["wte/embedding"],), table, False)
    found["ln_f", "kernel"] = Recipe((outer["ln_f/kernel"],), (width,), False)
    if not config.tie_embeddings:
        found["lm_head", "kernel"] = Recipe((outer["lm_head/kernel"],), table, False, transposed=True)
    return found


def _sizes(config: ModelConfig) -> tuple[int, int, int, int]:
    return config.heads * config.head_size, config.key_heads * config.head_size, config.width, config.ffn_width


HF_OUTER = {
    "wte/embedding": "model.embed_tokens.weight",
    "ln_f/kernel": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
HF_INNER = {
    "attention/wq/kernel": "self_attn.q_proj.weight",
    "attention/wk/kernel": "self_attn.k_proj.weight",
    "attention/wv/kernel": "self_attn.v_proj.weight",
    "attention/wo/kernel": "self_attn.o_proj.weight",
    "attention/wq/bias": "self_attn.q_proj.bias",
    "attention/wk/bias": "self_attn.k_proj.bias",
    "attention/wv/bias": "self_attn.v_proj.bias",
    "feed_forward/w1/kernel": "mlp.gate_proj.weight",
    "feed_forward/w2/kernel": "mlp.down_proj.weight",
    "feed_forward/w3/kernel": "mlp.up_proj.weight",
    "attention_norm/kernel": "input_layernorm.weight",
    "ffn_norm/kernel": "post_attention_layernorm.weight",
}
GGUF_OUTER = {
    "wte/embedding": "token_embd.weight",
    "ln_f/kernel": "output_norm.weight",
    "lm_head/kernel": "output.weight",
}
GGUF_INNER = {
    "attention/wq/kernel": "attn_q.weight",
    "attention/wk/kernel": "attn_k.weight",
    "attention/wv/kernel": "attn_v.weight",
    "attention/wo/kernel": "attn_output.weight",
    "attention/wq/bias": "attn_q.bias",
    "attention/wk/bias": "attn_k.bias",
    "attention/wv/bias": "attn_v.bias",
    "feed_forward/w1/kernel": "ffn_gate.weight",
    "feed_forward/w2/kernel": "ffn_down.weight",
    "feed_forward/w3/kernel": "ffn_up.weight",
    "attention_norm/kernel": "attn_norm.weight",
    "ffn_norm/kernel": "ffn_norm.weight",
}


def hf_recipes(config: ModelConfig) -> dict[Path, Recipe]:
    """Hugging Face's names and forms of LLaMA, Mistral and Qwen2."""
    return recipes(config, lambda i, name: f"model.layers.{i}.{name}", HF_OUTER, HF_INNER, split_halves=True)


def gguf_recipes(config: ModelConfig, *, split_halves: bool) -> dict[Path, Recipe]:
    """llama.cpp's; its converter has joined the pairs of LLaMA's heads already."""
    return recipes(config, lambda i, name: f"blk.{i}.{name}", GGUF_OUTER, GGUF_INNER, split_halves=split_halves)
