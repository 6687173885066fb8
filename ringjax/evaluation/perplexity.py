"""Perplexity by position: the loss of a token as a function of how much text is before it.

    row        one document from some token on, `length` tokens; no row crosses the end of a document
    loss       −log p(token | the tokens of the row before it), nats
    bucket b   the mean loss of positions b·length/buckets … (b+1)·length/buckets
    perplexity exp(mean loss)
    bits/byte  Σ loss / (ln 2 · bytes of the text): comparable between tokenizers, as nats a character are

Logits exist for a few tokens at a time.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ringjax.attention import layouts
from ringjax.evaluation.haystack import Haystack
from ringjax.evaluation.question import Cell
from ringjax.inference.text_model import TextModel
from ringjax.models.parallel import Parallel
from ringjax.training import distributed
from ringjax.training.loss import token_nll


class Row(NamedTuple):
    """A part of a document: `inputs` are read, `targets` follow each of the last of them."""

    document: int
    inputs: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]


def cut_rows(
    haystack: Haystack, length: int, most: int, bos_id: int | None, read_first: int | None = None
) -> list[Row]:
    """At most so many rows: whole ones of all documents first, then what is left at their ends.

    With a begin token every row begins with it; without, the first token of a row is not predicted. `read_first` is
    read before the beginning of a document, and changes nothing of what is predicted.
    """
    whole, rest = [], []
    for document, ids in enumerate(haystack.documents):
        first = 0 if bos_id is not None else 1
        while first < len(ids) and len(whole) < most:
            targets = ids[first : first + length]
            before = [bos_id] if bos_id is not None else ids[first - 1 : first]
            ahead = [read_first] if read_first is not None and first == 1 else []
            row = Row(document, np.concatenate([ahead, before, targets[:-1]]).astype(np.int32), targets)
            (whole if len(targets) == length else rest).append(row)
            first += length
    rows = [*whole, *rest][:most]
    if not rows:
        raise ValueError("no document of the haystack has two tokens; give a longer one")
    return rows


class Losses:
    """Sums of losses by position of a model, one compiled program a length.

    Rows may have `ahead` more inputs than targets at most.
    """

    def __init__(self, model: TextModel, length: int, buckets: int, ahead: int = 0):
        self._parallel, self._buckets, self._size = model.parallel, buckets, length
        step = 2 * self._parallel.ring_size
        self._length = -(-(length + ahead) // step) * step
        self._graph, params = nnx.split(model.model)
        placed = self._parallel.mesh is not None
        self._params = jax.device_put(params, self._parallel.param_shardings(params)) if placed else params
        self._chunk = model.model.config.loss_chunk
        self.rows = self._parallel.size("dp", "fsdp")
        """Rows at a time."""

    def __call__(self, rows: Sequence[Row]) -> tuple[Float[np.ndarray, "B buckets"], Int[np.ndarray, "B buckets"]]:
        """The summed loss, and the number of tokens, of each bucket of at most `self.rows` rows."""
        inputs, targets = (np.zeros((self.rows, self._length), np.int32) for _ in range(2))
        bucket = np.full((self.rows, self._length), self._buckets, np.int32)  # beyond all: no target
        for number, row in enumerate(rows):
            here = slice(len(row.inputs) - len(row.targets), len(row.inputs))
            inputs[number, : len(row.inputs)], targets[number, here] = row.inputs, row.targets
            places = np.arange(len(row.targets)) * self._buckets // self._size
            bucket[number, here] = np.minimum(places, self._buckets - 1)
        sums = _bucket_sums(
            self._params, inputs, targets, bucket, graph=self._graph, buckets=self._buckets, chunk=self._chunk,
            parallel=self._parallel,
        )  # fmt: skip
        counts = np.stack([np.bincount(x, minlength=self._buckets + 1)[:-1] for x in bucket[: len(rows)]])
        return distributed.fetch(sums).astype(np.float64)[: len(rows)], counts


@functools.partial(jax.jit, static_argnames=("graph", "buckets", "chunk", "parallel"))
def _bucket_sums(
    params, inputs, targets, bucket, *, graph, buckets: int, chunk: int, parallel: Parallel
) -> Float[Array, "B buckets"]:
    model = nnx.merge(graph, params)
    order, ring_size = layouts.get(parallel.layout), parallel.ring_size
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    inputs, targets, positions, bucket = (
        order.permute(x, ring_size, axis=1) for x in (inputs, targets, positions, bucket)
    )
    text = jnp.zeros(inputs.shape, bool)
    hidden = model.hidden(inputs, text, positions, parallel=parallel)
    heads = (model.head_kernel("text"), None)
    nll = token_nll(heads, hidden, targets, text, bucket < buckets, parallel=parallel, chunk=chunk)
    return jax.vmap(lambda losses, places: jax.ops.segment_sum(losses, places, buckets))(nll, bucket)


def record(
    method: str, cell: Cell, row: Row, text: str, sums: np.ndarray, counts: np.ndarray, seconds: float
) -> dict[str, Any]:
    """A line of the results; `text` is that of the row's targets (a character that is cut at an end counts as one)."""
    return {
        "method": method, **cell._asdict(), "document": row.document, "tokens": int(counts.sum()),
        "loss": float(sums.sum() / counts.sum()), "losses": [round(float(x), 6) for x in sums],
        "counts": counts.tolist(), "characters": len(text), "bytes": len(text.encode("utf-8")),
        "seconds": round(seconds, 4),
    }  # fmt: skip
