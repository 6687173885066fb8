"""Named models and the stages of context extension of LWM (Liu et al. 2024, arXiv:2402.08268).

>>> get_size("7b").parameter_count(vision=False)
6738415616
"""

import dataclasses
import difflib

from ringjax.models.config import ModelConfig


def _lwm(width: int, ffn_width: int, layers: int, heads: int, **changes) -> ModelConfig:
    return ModelConfig(width=width, ffn_width=ffn_width, layers=layers, heads=heads, **changes)


SIZES: dict[str, ModelConfig] = {
    "debug": _lwm(256, 256, 2, 2),
    "200m": _lwm(1024, 2048, 14, 8),
    "1b": _lwm(2048, 5504, 22, 16),
    "3b": _lwm(3200, 8640, 26, 32),
    "7b": _lwm(4096, 11008, 32, 32),
    "13b": _lwm(5120, 13824, 40, 40),
    "30b": _lwm(6656, 17920, 60, 52),
    "65b": _lwm(8192, 22016, 80, 64, norm_eps=1e-5),
    # HuggingFaceTB/SmolLM2-135M: GQA, tied embeddings, text only.
    "smollm2-135m": ModelConfig(
        width=576,
        ffn_width=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        vocab_size=49152,
        vision_vocab_size=0,
        rope_theta=100000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        init_std=1 / 24,
    ),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a context-extension schedule; `mesh` is dp,fsdp,tp,sp with one −1 to infer."""

    name: str
    seq_len: int
    rope_theta: float
    tokens: float
    steps: int
    batch_tokens: int
    learning_rate: float
    min_learning_rate: float
    mesh: tuple[int, int, int, int] | None = None

    @property
    def batch_size(self) -> int:
        """Rows in a step."""
        return self.batch_tokens // self.seq_len


def _text(name: str, length: int, theta: float, tokens: float, steps: int, tp: int, sp: int) -> Stage:
    return Stage(name, length, theta, tokens, steps, 2**22, 4e-5, 4e-5, (1, -1, tp, sp))


def _vision(name: str, length: int, tokens: float, steps: int, rate: float, least: float) -> Stage:
    return Stage(name, length, 5e7, tokens, steps, 2**23, rate, least)


# Thetas, tokens and the vision table as transcribed from the paper; the meshes are those of 512 chips.
STAGES: dict[str, tuple[Stage, ...]] = {
    "text": (
        _text("32k", 2**15, 1e6, 4.8e9, 1200, tp=4, sp=1),
        _text("128k", 2**17, 1e7, 12e9, 3000, tp=8, sp=1),
        _text("256k", 2**18, 1e7, 12e9, 3000, tp=16, sp=1),
        _text("512k", 2**19, 2.5e7, 3e9, 720, tp=16, sp=2),
        _text("1m", 2**20, 5e7, 1.8e9, 450, tp=16, sp=4),
    ),
    "vision": (
        _vision("1k", 2**10, 363e9, 45000, 6e-4, 6e-5),
        _vision("8k", 2**13, 107e9, 14000, 6e-4, 6e-5),
        _vision("32k", 2**15, 10e9, 1200, 8e-5, 8e-5),
        _vision("128k", 2**17, 3.5e9, 450, 8e-5, 8e-5),
        _vision("1m", 2**20, 0.4e9, 50, 8e-5, 8e-5),
    ),
}


def get_size(name: str) -> ModelConfig:
    """The model called `name`; raises ValueError that lists the nearest names."""
    if name not in SIZES:
        near = difflib.get_close_matches(str(name).lower(), SIZES, n=3, cutoff=0.3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"unknown model size {name!r}; the sizes are {', '.join(SIZES)}{hint}")
    return SIZES[name]


def stage_config(config: ModelConfig, stage: Stage) -> ModelConfig:
    """`config` with what a stage changes in the model."""
    return dataclasses.replace(config, rope_theta=stage.rope_theta)
