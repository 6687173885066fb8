"""Retrieval: chunks, the three indexes, embeddings, and the chunk with the needle in a short prompt."""

import zlib

import jax
import numpy as np
import pytest

from ringjax.evaluation.needle import NeedleTask
from ringjax.evaluation.question import Cell
from ringjax.evaluation.retrieval import INDEXES, Chunks, ModelEmbedding, Retrieval, SentenceEncoder, nearest
from ringjax.inference.text_model import TextModel
from ringjax.models import Parallel
from tests.evaluation import small
from tests.models import cases

CHUNKS = Chunks(chunk_tokens=120, overlap=60, top=2)


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    return small.form(tmp_path_factory.mktemp("retrieval"))


def test_every_token_is_in_a_chunk():
    for size in (1, 5, 8, 9, 30, 31):
        chunks = Chunks(8, 3, 2).cut(range(size))
        assert Chunks(8, 3, 2).join(chunks) == list(range(size))
        assert all(later[0] - earlier[0] == 5 for earlier, later in zip(chunks, chunks[1:]))
        assert max(len(ids) for _, ids in chunks) <= 8
    assert Chunks(8, 3, 2).join([(20, [20, 21]), (0, [0, 1])]) == [0, 1, 20, 21]


@pytest.mark.parametrize("values", [(0, 0, 1), (8, 8, 1), (8, -1, 1), (8, 0, 0)])
def test_chunks_that_cannot_be(values):
    with pytest.raises(ValueError, match="must be"):
        Chunks(*values)


def words(vocabulary):
    """Chunks by the words in them: a sentence encoder that needs no training."""

    def embed(chunks):
        vectors = np.zeros((len(chunks), 512), np.float32)
        for row, ids in enumerate(chunks):
            for word in vocabulary.decode(ids).lower().replace("?", " ").split():
                vectors[row, zlib.crc32(word.encode()) % 512] += 1
        return vectors

    return embed


@pytest.mark.parametrize("index", INDEXES)
def test_the_needles_chunk_is_found_and_read(form, index):
    pytest.importorskip("faiss")
    task = NeedleTask(form, small.haystack(form), (50.0,))
    retrieval = Retrieval(form.model, index, words(form.vocabulary), CHUNKS, 800, 4)
    for i in range(3):
        question = task.ask(Cell("needle", 2000, 50.0, i))
        found = retrieval.find(question)
        assert any(question.answers[0] in form.vocabulary.decode(ids) for _, ids in found)
    reading = retrieval.read(question, lambda text: False)
    assert reading.tokens <= 2 * 120 + len(question.before) + len(question.after) < len(question.tokens)
    assert reading.extra["chunks"] == sorted(start for start, _ in found)
    assert reading.seconds >= reading.first_seconds >= reading.extra["retrieval_seconds"] > 0


@pytest.mark.parametrize("index", INDEXES)
def test_indexes_find_what_is_nearest(index):
    pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert nearest(index, vectors, vectors[17], 3)[0] == 17
    assert len(nearest(index, vectors[:2], vectors[0], 3)) == 2
    if index == "flat":
        assert nearest(index, vectors, vectors[5], 4) == np.argsort(-vectors @ vectors[5])[:4].tolist()


def test_the_models_own_embedding(form, tmp_path):
    chunks = [form.vocabulary.encode(text) for text in ("A cat.", "Many more words than that.")]
    found = ModelEmbedding(form.model, 26)(chunks)
    model = form.model.model
    read = jax.jit(lambda tokens, modality, positions: model.hidden(tokens, modality, positions))
    for ids, vector in zip(chunks, found):
        tokens = np.asarray([ids], np.int32)
        hidden = read(tokens, np.zeros(tokens.shape, bool), np.arange(len(ids), dtype=np.int32)[None])
        np.testing.assert_allclose(vector, np.asarray(hidden)[0].mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_embeddings_on_a_mesh(form, tmp_path):
    chunks = [form.vocabulary.encode(text) for text in ("A cat.", "Many more words than that.")]
    found = ModelEmbedding(form.model, 26)(chunks)
    parallel = Parallel(cases.mesh(1, 2, 1, 4), "zigzag")
    meshed = TextModel.load(small.folder(tmp_path), dtype="float32", parallel=parallel)
    np.testing.assert_allclose(ModelEmbedding(meshed, 26)(chunks), found, rtol=1e-4, atol=1e-5)


def test_what_is_not_installed(form, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'ringjax\[retrieval\]'"):
        Retrieval(form.model, "flat", words(form.vocabulary), CHUNKS, 800, 4)
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="needs sentence-transformers, which is not installed"):
        SentenceEncoder("some/encoder", form.model)


def test_a_sentence_encoder(form, monkeypatch):
    class Encoder:
        def __init__(self, name):
            self.name = name

        def encode(self, texts):
            return [[float(len(text)), 1.0] for text in texts]

    module = type(pytest)("sentence_transformers")
    module.SentenceTransformer = Encoder
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", module)
    assert SentenceEncoder("any", form.model)([form.vocabulary.encode("four")]).tolist() == [[4.0, 1.0]]
