"""Floating-point operations of training, from the sizes of a model: how they grow with the context.

    products     2 a parameter and token forward, 4 backward: 6 · P          (Kaplan et al. 2020, arXiv:2001.08361)
    attention    4·N·H a (query, key) pair forward, 8·N·H backward, and a causal row of T tokens has T²/2 pairs:
                 6 · L · N·H · T a token                                      (PaLM, arXiv:2204.02311, appendix B)

So a context of T costs `1 + L·N·H·T / P` times what short ones do, and with P ≈ 12·L·D² that is `1 + T / (12·D)`: the
wider a model, the longer the context that it gets for little. Liu et al. 2023 (arXiv:2310.01889), section on training
FLOPs, has the figure of it, with every pair counted (T² in place of T²/2).
"""

import dataclasses

from ringjax.models.config import ModelConfig

CONTEXTS = 2**15, 2**17, 2**19, 2**20, 2**21, 2**22, 10 * 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """What FLOPs depend on; `parameters` are those of matrix products and tables together."""

    name: str
    parameters: float
    layers: int
    width: int

    @classmethod
    def of(cls, name: str, config: ModelConfig) -> "Shape":
        """A model's; `width` is N·H."""
        return cls(name, config.parameter_count(), config.layers, config.heads * config.head_size)


# GPT-3's family (Brown et al. 2020, arXiv:2005.14165, table 2.1) and beyond it, as in the Ring Attention paper's
# figure: the last is 1T parameters with 12·L·D² = 1T.
FAMILY = (
    Shape("1B", 1.3e9, 24, 2048), Shape("3B", 2.7e9, 32, 2560), Shape("7B", 6.7e9, 32, 4096),
    Shape("13B", 13e9, 40, 5120), Shape("30B", 30e9, 48, 7168), Shape("65B", 65e9, 80, 8192),
    Shape("175B", 175e9, 96, 12288), Shape("1T", 1e12, 128, 25600),
)  # fmt: skip


def per_token(shape: Shape, context: int) -> float:
    """Training FLOPs a token of rows of `context` tokens under a causal mask: 6·P + 6·L·N·H·T."""
    return 6 * shape.parameters + 6 * shape.layers * shape.width * float(context)


def ratio(shape: Shape, context: int, base: int = 4096) -> float:
    """How many times as much a token costs as at a context of `base`."""
    return per_token(shape, context) / per_token(shape, base)


def pairs_per_row(seq_len: int, window: int | None = None) -> float:
    """Visible (query, key) pairs of a causal row: Σ min(g + 1, window) over its tokens g.

    >>> pairs_per_row(4), pairs_per_row(4, window=2)
    (10.0, 7.0)
    """
    if window is None or window >= seq_len:
        return seq_len * (seq_len + 1) / 2
    return window * (window + 1) / 2 + float(seq_len - window) * window


def matrix_parameters(model: ModelConfig) -> tuple[float, float, float]:
    """Parameters that multiply a token: of a block's attention, of its feed-forward, and of the heads.

    A token goes through one of the two heads, the text head here; looking up a table is no product.
    """
    queries, keys = model.heads * model.head_size, model.key_heads * model.head_size
    return (
        2.0 * model.width * (queries + keys),
        3.0 * model.width * model.ffn_width,
        1.0 * model.width * model.vocab_size,
    )


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one token's step, by what computes them. `repeated` is what a remat policy computes again."""

    products: float
    repeated: float
    attention_forward: float
    attention_backward: float


def step_flops(model: ModelConfig, seq_len: int) -> StepFlops:
    """What a training step really computes for a token, recomputation included.

    | remat | computed again |
    | --- | --- |
    | none, save_products | nothing |
    | save_feed_forward | q, k, v |
    | save_attention, offload | q, k, v, attention's output projection, gate and up |
    | full | the same and attention itself |

    The loss makes its logits twice, and so does the blockwise feed-forward gate and up. Attention's backward pass has
    five products where the forward has two: 2.5 times its FLOPs.
    """
    attention, feed_forward, head = matrix_parameters(model)
    keys = model.key_heads / model.heads
    projections = attention * (1 + 2 * keys) / (2 + 2 * keys)  # q, k, v; the rest is the output's
    gate_and_up = feed_forward * 2 / 3
    again = {
        "none": 0.0, "save_products": 0.0, "save_feed_forward": projections,
        "save_attention": attention + gate_and_up, "offload": attention + gate_and_up, "full": attention + gate_and_up,
    }[model.remat]  # fmt: skip
    if model.ffn_chunk and model.remat in ("none", "save_products", "save_feed_forward"):
        again += gate_and_up
    visible = pairs_per_row(seq_len, model.window) / seq_len
    forward = 4.0 * model.heads * model.head_size * visible * model.layers
    return StepFlops(
        products=6 * (model.layers * (attention + feed_forward) + head),
        repeated=2 * (model.layers * again + head),
        attention_forward=forward * (2 if model.remat == "full" else 1),
        attention_backward=2.5 * forward,
    )
