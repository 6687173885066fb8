"""From logits to a token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: `repetition_penalty`, then temperature, `top_k`, `top_p` of what is left, then `min_p`.

    Raises ValueError for a value outside its range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0: always the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens (and those that tie with the last of them)."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability (Holtzman et al. 2019, arXiv:1904.09751)."""
    guidance: float = 1.0
    """Classifier-free guidance: how far to go from the logits without the condition to those with it; 1: not used."""
    seed: int = 0
    """Of the random numbers. A row's numbers depend on the seed and its place in the batch, not on the other rows."""
    min_p: float | None = None
    """Only tokens at least this likely, as a share of the likeliest one (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and of what was generated become less likely above 1, likelier below; 1: not used."""

    def __post_init__(self):
        _require(
            self.temperature >= 0 and math.isfinite(self.temperature), "temperature", self.temperature, "0 or more"
        )
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or None")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1, or None")
        _require(self.min_p is None or 0 < self.min_p <= 1, "min_p", self.min_p, "above 0 and at most 1, or None")
        _require(math.isfinite(self.guidance), "guidance", self.guidance, "a finite number; 1 switches it off")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")
        penalty = self.repetition_penalty
        _require(penalty > 0 and math.isfinite(penalty), "repetition_penalty", penalty, "above 0; 1 switches it off")


def _require(condition: bool, name: str, value, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} {value!r} must be {rule}")


def row_keys(sampling: Sampling, rows: int) -> Key[Array, " B"]:
    """The random keys of a batch: of the seed and the row's place."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), jnp.arange(rows))


def step_keys(keys: Key[Array, " B"], step: Int[Array, ""]) -> Key[Array, " B"]:
    """The keys for the token of a step."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def guide(
    conditional: Float[Array, "... V"], unconditional: Float[Array, "... V"], guidance: float
) -> Float[Array, "... V"]:
    """`unconditional + guidance · (conditional − unconditional)` (Ho & Salimans 2022, arXiv:2207.12598)."""
    return unconditional + guidance * (conditional - unconditional)


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Logits of tokens that were `seen`, divided by `penalty` where they are above 0, times it where they are below.

    Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, who divide all; negative logits, which that would make
    likelier, are multiplied as in Hugging Face's transformers.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling, seen: Bool[Array, "B V"] | None = None
) -> Int[Array, " B"]:
    """A token of each row, drawn with the row's own key. `seen` is what `repetition_penalty` is for (None: nothing)."""
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """−inf for all but the `k` largest of each row; what ties with the last of them stays."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """−inf for all but the fewest tokens of each row, likeliest first, whose probabilities reach `p`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    chances = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances  # of all likelier tokens: the one that crosses p stays
    least = jnp.min(ordered, axis=-1, keepdims=True, where=before < p, initial=jnp.inf)
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """−inf for tokens less likely than `p` times the likeliest one of their row."""
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(p), logits, -jnp.inf)
