"""The shape of a model, checked when it is read."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Literal, get_args

import jax.numpy as jnp

from ringjax.attention import layouts
from ringjax.json_text import brief

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Remat = Literal["none", "save_products", "save_feed_forward", "save_attention", "offload", "full"]


# Generous bounds, so that a size read from a damaged file is refused before anything is built, or counted, up to it.
_LARGEST = {"layers": 1 << 12, "heads": 1 << 14, "kv_heads": 1 << 14, "head_dim": 1 << 16, "unroll": 1 << 12}
_LARGEST_SIZE = (1 << 31) - 1
_LARGEST_NUMBER = 1e300


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies change for contexts longer than those the model was first trained on.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3` only those whose
    wavelength is long (Llama 3.1); `yarn` blends by the number of turns and sharpens attention (Peng et al. 2023,
    arXiv:2309.00071). The fields have the names that published models give them.
    """

    kind: Literal["linear", "llama3", "yarn"]
    """The rule."""
    factor: float
    """New context over old context."""
    original_max_position: int | None = None
    """Tokens of the old context (llama3 and yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original / low_freq_factor are divided by `factor` fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / high_freq_factor are left alone."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this in the old context are left alone."""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this are divided by `factor` fully."""
    attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied by; null: 0.1·ln(factor) + 1 (or from the mscales)."""
    mscale: float | None = None
    """yarn, with `mscale_all_dim`: the numerator's slope in place of 0.1 · 1 (DeepSeek)."""
    mscale_all_dim: float | None = None
    """yarn: the denominator's slope."""
    truncate: bool = True
    """yarn: whether the ends of the blend are rounded to whole pairs."""

    def __post_init__(self):
        _one_of("rope_scaling.kind", self.kind, ("linear", "llama3", "yarn"))
        _at_least("rope_scaling.factor", self.factor, 1.0)
        if self.kind != "linear":
            if self.original_max_position is None:
                raise ValueError(
                    f"rope_scaling.kind {self.kind!r} needs original_max_position, the tokens of the context that the"
                    " model was first trained on"
                )
            _at_least("rope_scaling.original_max_position", self.original_max_position, 1)
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            _positive(f"rope_scaling.{name}", getattr(self, name))
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                _at_least(f"rope_scaling.{name}", getattr(self, name), 0.0)
        for slow, fast in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, slow) < getattr(self, fast):
                raise ValueError(
                    f"rope_scaling.{slow} {getattr(self, slow)} must lie between 0 and {fast} {getattr(self, fast)}"
                )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("rope_scaling.mscale and mscale_all_dim belong together; set both or neither")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An LLaMA-like transformer with two token tables and two heads, one for text and one for vision (LWM).

    Raises ValueError for sizes that do not fit each other.
    """

    width: int
    """D, the size of the residual stream."""
    ffn_width: int
    """F, the inner size of the SwiGLU feed-forward."""
    layers: int
    """Transformer blocks."""
    heads: int
    """N, query heads."""
    kv_heads: int | None = None
    """K, key/value heads; must divide heads; null: as many as heads."""
    head_dim: int | None = None
    """H, even; null: width / heads."""
    vocab_size: int = 32000
    """Text ids."""
    vision_vocab_size: int = 8448
    """Vision ids; 0: a text model without the vision table and head."""
    vision_codes: int = 8192
    """Ids of image codes are below this; this one ends a frame, the next ends the vision."""
    rope_theta: float = 10000.0
    """RoPE's base."""
    rope_scaling: RopeScaling | None = None
    """RoPE's rule for longer contexts."""
    norm_eps: float = 1e-6
    """Added to RMSNorm's mean square."""
    tie_embeddings: bool = False
    """Whether the heads are the transposed token tables."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias (Qwen)."""
    window: int | None = None
    """Sliding window: a token sees this many tokens, itself included; null: all before it."""
    sinks: int = 0
    """Attention sinks, for inference: the first tokens of a row stay visible beside the window (StreamingLLM)."""
    shifted_group: int | None = None
    """For training: S²-Attn in groups of so many tokens (LongLoRA, `models/shifted.py`); null: full attention."""
    softcap: float | None = None
    """Attention scores are softcap · tanh(score / softcap); null: as they are."""
    dropout: float = 0.0
    """For training: this share of the embedding, and of what attention and feed-forward add to the stream, is dropped
    (`models/dropout.py`)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    dtype: Dtype = "bfloat16"
    """Of activations and matrix products."""
    param_dtype: Dtype = "float32"
    """Of the parameters."""
    remat: Remat = "none"
    """What the backward pass computes again, from nothing to everything (`models/remat.py` has the table): the further
    down the list, the less memory and the more work; 'save_attention' for long rows, 'offload' for the longest."""
    unroll: int = 1
    """Blocks in one step of the scan over the layers. As many as there are layers: no scan, so that nothing is copied
    into or out of stacked arrays, for a longer compilation."""
    ffn_chunk: int | None = None
    """Blockwise feed-forward: tokens of a device at a time; null: all at once."""
    loss_chunk: int = 1024
    """Tokens of a device whose logits exist at a time."""

    def __post_init__(self):
        for name in ("width", "ffn_width", "layers", "heads", "vocab_size", "unroll", "loss_chunk"):
            _at_least(name, getattr(self, name), 1, whole=True)
        self._check_bounds()
        for name in ("kv_heads", "head_dim", "window", "ffn_chunk"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1, whole=True)
        for name in ("rope_theta", "norm_eps", "init_std"):
            _positive(name, getattr(self, name))
        _at_least("sinks", self.sinks, 0, whole=True)
        if self.sinks and self.window is None:
            raise ValueError(f"sinks {self.sinks} without a window: every token is visible anyhow; set a window too")
        if self.softcap is not None:
            _positive("softcap", self.softcap)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1: it is the share that is dropped")
        self._check_groups()
        for name, choices in (("dtype", get_args(Dtype)), ("param_dtype", get_args(Dtype)), ("remat", get_args(Remat))):
            _one_of(name, getattr(self, name), choices)
        if self.remat == "offload" and self.unroll > 1:
            raise ValueError(
                f"unroll {self.unroll} with remat 'offload': what goes to host memory is what a scan over the layers"
                " stacks; use unroll 1, or another remat"
            )
        self._check_heads()
        self._check_vision()

    def _check_bounds(self) -> None:
        sizes = (
            "width",
            "ffn_width",
            "vocab_size",
            "vision_vocab_size",
            "vision_codes",
            "window",
            "sinks",
            "ffn_chunk",
            "loss_chunk",
            "shifted_group",
        )
        for name in (*sizes, *_LARGEST):
            value, most = getattr(self, name), _LARGEST.get(name, _LARGEST_SIZE)
            if isinstance(value, int) and value > most:
                raise ValueError(
                    f"{name} {brief(value)} is more than {most}, the most that is taken for a model's size"
                )

    def _check_groups(self) -> None:
        if self.shifted_group is None:
            return
        _at_least("shifted_group", self.shifted_group, 2, whole=True)
        if self.shifted_group % 2:
            raise ValueError(
                f"shifted_group {self.shifted_group} is odd, and the other heads' groups lie half a group on; use"
                f" {self.shifted_group + 1}"
            )
        if self.heads < 2:
            raise ValueError(f"shifted_group {self.shifted_group} needs two heads at least: one has no other half")
        if self.sinks:
            raise ValueError(f"shifted_group {self.shifted_group} is for training, sinks {self.sinks} for inference")

    def _check_heads(self) -> None:
        if self.heads % self.key_heads:
            divisors = ", ".join(str(k) for k in range(1, self.heads + 1) if self.heads % k == 0)
            raise ValueError(
                f"kv_heads {self.key_heads} does not divide heads {self.heads}: every key head serves the same number"
                f" of query heads; use one of {divisors}"
            )
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}; set head_dim")
        if self.head_size % 2:
            raise ValueError(
                f"head_dim {self.head_size} is odd and RoPE turns pairs; use {self.head_size + 1} or other heads"
            )

    def _check_vision(self) -> None:
        _at_least("vision_vocab_size", self.vision_vocab_size, 0, whole=True)
        _at_least("vision_codes", self.vision_codes, 1, whole=True)
        if self.vision_vocab_size and self.vision_vocab_size < self.vision_codes + 2:
            raise ValueError(
                f"vision_vocab_size {self.vision_vocab_size} must hold vision_codes {self.vision_codes} codes and two"
                f" end marks; use at least {self.vision_codes + 2}, or 0 for a model without vision"
            )

    @property
    def key_heads(self) -> int:
        """K: kv_heads, or heads where it is null."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """H: head_dim, or width / heads where it is null."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def end_of_frame(self) -> int:
        """The vision id after every frame but the last."""
        return self.vision_codes

    @property
    def end_of_vision(self) -> int:
        """The vision id after the last frame, and after a single picture."""
        return self.vision_codes + 1

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a type."""
        return jnp.dtype(self.dtype)

    @property
    def storage_dtype(self) -> jnp.dtype:
        """`param_dtype` as a type."""
        return jnp.dtype(self.param_dtype)

    def parameter_count(self, vision: bool = True) -> int:
        """How many parameters the model has; without the vision table and head where `vision` is false."""
        q, kv = self.heads * self.head_size, self.key_heads * self.head_size
        attention = 2 * self.width * (q + kv) + (q + 2 * kv if self.qkv_bias else 0)
        block = attention + 3 * self.width * self.ffn_width + 2 * self.width
        tables = (1 if self.tie_embeddings else 2) * (self.vocab_size + (self.vision_vocab_size if vision else 0))
        return self.layers * block + tables * self.width + self.width

    def validate_mesh(
        self,
        mesh_shape: Mapping[str, int],
        *,
        seq_len: int | None = None,
        layout: str = "striped",
        batch: int | None = None,
    ) -> None:
        """Raises ValueError where the model, or rows of `seq_len` tokens, cannot be cut over such a mesh.

        `mesh_shape` maps axis names (dp, fsdp, tp, sp; absent means 1) to sizes, as `mesh.shape` does.
        """
        tp, sp = mesh_shape.get("tp", 1), mesh_shape.get("sp", 1)
        cut = {"heads": self.heads, "ffn_width": self.ffn_width, "vocab_size": self.vocab_size}
        if self.vision_vocab_size:
            cut["vision_vocab_size"] = self.vision_vocab_size
        if self.key_heads % tp and tp % self.key_heads:
            raise ValueError(
                f"tp {tp} neither divides kv_heads {self.key_heads} nor is a multiple of it; use a tp that does one of"
                " both and divides heads"
            )
        for name, size in cut.items():
            if size % tp:
                usable = math.gcd(*cut.values())
                raise ValueError(
                    f"tp {tp} does not divide {name} {size}; use a tp that divides {usable}"
                    + (", or pad the vocabulary" if "vocab" in name else "")
                )
        if seq_len is not None:
            layouts.get(layout).validate(seq_len, sp)
        rows = mesh_shape.get("dp", 1) * mesh_shape.get("fsdp", 1)
        if batch is not None and batch % rows:
            raise ValueError(
                f"batch {batch} cannot be cut over dp·fsdp = {rows} groups of devices; use a multiple of {rows}"
            )


def _one_of(name: str, value, choices) -> None:
    if value not in choices:
        near = difflib.get_close_matches(brief(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} {brief(value)} is not one of {', '.join(map(repr, choices))}{hint}")


def _at_least(name: str, value, least: float, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    most = math.inf if whole else _LARGEST_NUMBER
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < most:
        raise ValueError(f"{name} {brief(value)} must be a {'whole ' if whole else ''}number of at least {least}")


def _positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST_NUMBER:
        raise ValueError(f"{name} {brief(value)} must be a finite number above 0")
