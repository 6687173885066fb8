"""The codebook: nearest code, the gradient through it, and moving averages that keep every code in use."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def nearest_code(latents: Float[Array, "*n D"], codebook: Float[Array, "N D"]) -> Int[Array, "*n"]:
    """The code with the smallest Euclidean distance; of equal ones the first.

        code = argmin_j |z − e_j|² = argmin_j (|e_j|² − 2 z·e_j)

    Float32 at full precision: the few bits that TPUs and TF32 keep by default change codes.
    """
    latents, codebook = latents.astype(jnp.float32), codebook.astype(jnp.float32)
    products = jnp.einsum("...d,nd->...n", latents, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * products, axis=-1).astype(jnp.int32)


def straight_through(latents: Float[Array, "*n D"], entries: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """`entries` forward; backward, the gradient passes to `latents` as it is (van den Oord 2017, arXiv:1711.00937)."""
    return latents + jax.lax.stop_gradient(entries - latents)


class CodebookAverages(NamedTuple):
    """Moving averages, for each code, of how many latents chose it and of their sum."""

    counts: Float[Array, "N"]
    sums: Float[Array, "N D"]

    @classmethod
    def start(cls, codebook: Float[Array, "N D"]) -> "CodebookAverages":
        """Averages under which the codebook is as given."""
        return cls(jnp.ones(len(codebook), jnp.float32), jnp.asarray(codebook, jnp.float32))


def update_codebook(
    averages: CodebookAverages,
    latents: Float[Array, "n D"],
    codes: Int[Array, "n"],
    key: PRNGKeyArray,
    *,
    decay: float = 0.99,
    dead_share: float = 0.05,
) -> tuple[CodebookAverages, Float[Array, "N D"]]:
    """One step of online k-means; returns the new averages and the codebook.

        counts ← γ counts + (1 − γ) n_j        sums ← γ sums + (1 − γ) Σ_{z chose j} z        e_j = sums / counts

    A code chosen by less than `dead_share` of an even share is dead: it moves onto a random latent of this batch, so
    that it is chosen from then on. Van den Oord 2017, appendix A.1; restarts as in Dhariwal 2020, arXiv:2005.00341.
    """
    size = len(averages.counts)
    chosen = jax.nn.one_hot(codes, size, dtype=jnp.float32)
    counts = decay * averages.counts + (1 - decay) * chosen.sum(0)
    sums = decay * averages.sums + (1 - decay) * jnp.einsum("nj,nd->jd", chosen, latents.astype(jnp.float32))
    even_share = len(latents) / size
    dead = counts < dead_share * even_share
    moved = latents[jax.random.randint(key, (size,), 0, len(latents))].astype(jnp.float32)
    counts = jnp.where(dead, even_share, counts)
    sums = jnp.where(dead[:, None], moved * even_share, sums)
    return CodebookAverages(counts, sums), sums / counts[:, None]
