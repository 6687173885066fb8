"""Retrieval instead of a long context: chunks in a FAISS index, the nearest ones in a short prompt.

context  ->  chunks of c tokens, each beginning c − overlap after the one before
chunk    ->  vector: the mean of the model's last hidden states, less the mean of all chunks, of length 1;
             or that of a sentence encoder
question ->  vector  ->  the `top` nearest chunks, in the order of the document  ->  the model

flat    compares with every chunk: exact
hnsw    walks a graph of near neighbours (Malkov & Yashunin 2016, arXiv:1603.09320)
lsh     compares signs of random projections (Charikar 2002)
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ringjax.attention import layouts
from ringjax.evaluation.question import Question
from ringjax.evaluation.reading import Enough, Reading, answer, force, open_session
from ringjax.inference.text_model import TextModel
from ringjax.models.parallel import Parallel
from ringjax.training import distributed

INDEXES = ("flat", "hnsw", "lsh")
_ROWS = 16
_NEIGHBOURS, _SEARCHED, _BITS = 32, 64, 512
# Shorter vectors have no direction: they stay short.
_TINY = 1e-6


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Pieces of a context, `chunk_tokens` each but the last, that overlap by `overlap` tokens; `top` are read."""

    chunk_tokens: int = 128
    overlap: int = 32
    top: int = 8

    def __post_init__(self):
        if self.chunk_tokens < 1 or self.top < 1:
            raise ValueError(f"chunk_tokens {self.chunk_tokens} and top {self.top} must be at least 1")
        if not 0 <= self.overlap < self.chunk_tokens:
            raise ValueError(f"overlap {self.overlap} must be 0 or more and below chunk_tokens {self.chunk_tokens}")

    def cut(self, ids: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Where each chunk begins, and its tokens. Every token is in one."""
        step = self.chunk_tokens - self.overlap
        starts = range(0, max(1, len(ids) - self.overlap), step)
        return [(start, list(ids[start : start + self.chunk_tokens])) for start in starts]

    def join(self, chunks: Sequence[tuple[int, list[int]]]) -> list[int]:
        """The chunks in the order of the document; what two of them share comes once."""
        joined, end = [], 0
        for start, ids in sorted(chunks):
            joined += ids[max(0, end - start) :]
            end = max(end, start + len(ids))
        return joined


class Retrieval:
    """Answers from the chunks that are nearest to the question. Everything is timed: embedding, index and answer."""

    def __init__(self, model: TextModel, index: str, embed: Callable, chunks: Chunks, words: int, max_new_tokens: int):
        """`words` are the tokens of a prompt beside its context, at most."""
        self._model, self._index, self._embed, self._chunks = model, index, embed, chunks
        self._new = max_new_tokens
        self._session = open_session(model, chunks.top * chunks.chunk_tokens + words + max_new_tokens)
        _faiss()

    def read(self, question: Question, enough: Enough) -> Reading:
        """The greedy answer, until it is `enough`."""
        return self._about(question, lambda ids: answer(self._model, self._session, ids, self._new, enough))

    def force(self, question: Question, expected: Sequence[int]) -> Reading:
        """See `reading.force`."""
        return self._about(question, lambda ids: force(self._model, self._session, ids, expected))

    def _about(self, question: Question, go_on: Callable[[list[int]], Reading]) -> Reading:
        start = time.perf_counter()
        found = self.find(question)
        took = time.perf_counter() - start
        reading = go_on([*question.before, *self._chunks.join(found), *question.after])
        return dataclasses.replace(
            reading,
            first_seconds=reading.first_seconds + took,
            seconds=reading.seconds + took,
            extra={**reading.extra, "chunks": sorted(start for start, _ in found), "retrieval_seconds": took},
        )

    def find(self, question: Question) -> list[tuple[int, list[int]]]:
        """The chunks that the index gives for the question, nearest first."""
        chunks = self._chunks.cut(question.context)
        query = self._model.vocabulary.encode(question.query)
        vectors = self._embed([*(ids for _, ids in chunks), query])
        vectors = _unit(vectors - vectors[:-1].mean(axis=0)) if len(chunks) > 1 else _unit(vectors)
        places = nearest(self._index, vectors[:-1], vectors[-1], self._chunks.top)
        return [chunks[place] for place in places]


def nearest(kind: str, vectors: Float[np.ndarray, "n D"], query: Float[np.ndarray, " D"], top: int) -> list[int]:
    """The `top` vectors that an index of this kind finds for the query, nearest first; fewer where it finds fewer."""
    faiss, size = _faiss(), vectors.shape[1]
    if kind == "flat":
        index = faiss.IndexFlatIP(size)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(size, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = _SEARCHED
    else:
        index = faiss.IndexLSH(size, _BITS)
    index.add(np.ascontiguousarray(vectors, np.float32))
    _, found = index.search(np.ascontiguousarray(query[None], np.float32), min(top, len(vectors)))
    return [int(place) for place in found[0] if place >= 0]


class ModelEmbedding:
    """The mean of the model's last hidden states over a chunk's tokens; of longer ones, over the last `width`."""

    def __init__(self, model: TextModel, width: int):
        parallel = model.parallel
        step = 2 * parallel.ring_size
        self._width = -(-width // step) * step
        self._rows = -(-_ROWS // parallel.size("dp", "fsdp")) * parallel.size("dp", "fsdp")
        self._graph, params = nnx.split(model.model)
        self._params = params if parallel.mesh is None else jax.device_put(params, parallel.param_shardings(params))
        self._parallel = parallel

    def __call__(self, chunks: Sequence[Sequence[int]]) -> Float[np.ndarray, "n D"]:
        """A row a chunk, float32."""
        tokens = np.zeros((-(-len(chunks) // self._rows) * self._rows, self._width), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for row, ids in enumerate(chunks):
            ids = list(ids)[-self._width :]
            tokens[row, : len(ids)], lengths[row] = ids, max(1, len(ids))
        found = []
        for first in range(0, len(tokens), self._rows):
            rows = slice(first, first + self._rows)
            found.append(_means(self._params, tokens[rows], lengths[rows], graph=self._graph, parallel=self._parallel))
        return np.concatenate(distributed.fetch(found))[: len(chunks)]


@functools.partial(jax.jit, static_argnames=("graph", "parallel"))
def _means(params, tokens: Int[Any, "B T"], lengths: Int[Any, " B"], *, graph, parallel: Parallel):
    order, ring_size = layouts.get(parallel.layout), parallel.ring_size
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    tokens, positions = (order.permute(x, ring_size, axis=1) for x in (tokens, positions))
    hidden = nnx.merge(graph, params).hidden(tokens, jnp.zeros(tokens.shape, bool), positions, parallel=parallel)
    inside = positions < lengths[:, None]  # a causal model: what fills up a row changes nothing before it
    total = jnp.sum(jnp.where(inside[..., None], hidden.astype(jnp.float32), 0), axis=1)
    return total / lengths[:, None]


class SentenceEncoder:
    """Chunks as text through a model of the sentence-transformers library, named or as a folder."""

    def __init__(self, name: str, model: TextModel):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ImportError(
                f"embed {name!r} needs sentence-transformers, which is not installed: pip install"
                " sentence-transformers, or use --embed model"
            ) from None
        self._encoder, self._vocabulary = SentenceTransformer(name), model.vocabulary

    def __call__(self, chunks: Sequence[Sequence[int]]) -> Float[np.ndarray, "n D"]:
        """A row a chunk, float32."""
        texts = [self._vocabulary.decode(ids) for ids in chunks]
        return np.asarray(self._encoder.encode(texts), np.float32)


def _unit(vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _TINY)


def _faiss():
    try:
        import faiss
    except ImportError:
        raise ImportError("retrieval needs FAISS, which is not installed: pip install 'ringjax[retrieval]'") from None
    # For a few hundred vectors threads only wait for each other: a search took seconds on two busy cores.
    faiss.omp_set_num_threads(1)
    return faiss
