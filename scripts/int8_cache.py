"""What an int8 cache costs a model: its loss on a text and its logits, beside those of the cache as it is.

    python scripts/int8_cache.py smollm2 emma.txt --tokens 2048
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ringjax.inference.text_model import TextModel
from ringjax.models.cache import empty_cache
from ringjax.models.parallel import Parallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    text_model = TextModel.load(given.model, dtype="float32")
    # Enough characters for the tokens: encoding a whole novel takes a while.
    ids = text_model.vocabulary.prompt(given.text.read_text("utf-8")[: 12 * given.tokens])[: given.tokens]
    exact, rounded = (logits(text_model.model, ids, kind) for kind in (None, "int8"))
    for name, found in (("as it is", exact), ("int8", rounded)):
        print(f"cache {name:8s}  loss {loss(found, ids):.5f}")
    difference = np.abs(exact - rounded)
    same = np.mean(exact.argmax(-1) == rounded.argmax(-1))
    largest = f"largest {difference.max():.2e} of {np.abs(exact).max():.1f}"
    print(f"logits: mean difference {difference.mean():.2e}, {largest}")
    print(f"the same likeliest token at {100 * same:.2f} % of {len(ids)} places")


def logits(model, ids: list[int], kind: str | None) -> np.ndarray:
    """`[T, V]`, of tokens that read each other through the cache."""
    cache = empty_cache(model.config, 1, -(-len(ids) // 8) * 8, Parallel(), kind)
    tokens = jnp.asarray([ids], jnp.int32)
    run = jax.jit(lambda tokens, cache: model.decode(
        tokens, jnp.zeros(tokens.shape, bool), jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], cache
    )[0][0])  # fmt: skip
    return np.asarray(model.text_logits(run(tokens, cache)))


def loss(found: np.ndarray, ids: list[int]) -> float:
    chances = jax.nn.log_softmax(found[:-1].astype(np.float64))
    return float(-np.mean(np.take_along_axis(np.asarray(chances), np.asarray(ids[1:])[:, None], 1)))


if __name__ == "__main__":
    main()
