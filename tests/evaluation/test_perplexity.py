"""Losses by position: those of the plain formula, whatever the mesh; rows that respect documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.evaluation.haystack import Haystack
from ringjax.evaluation.perplexity import Losses, cut_rows
from ringjax.inference.text_model import TextModel
from ringjax.models import Parallel
from ringjax.models.transformer import with_config
from tests.evaluation import small
from tests.models import cases


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    return small.form(tmp_path_factory.mktemp("perplexity"))


def test_rows_end_with_their_document():
    documents = Haystack((np.arange(10), np.arange(100, 107), np.arange(200, 201)))
    rows = cut_rows(documents, 4, 9, None)
    assert [row.targets.tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8], [101, 102, 103, 104], [9], [105, 106]]
    assert [row.inputs.tolist() for row in rows][:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows[4].inputs.tolist() == [104, 105] and [row.document for row in rows] == [0, 0, 1, 0, 1]
    begun = cut_rows(documents, 4, 2, 7)
    assert [row.inputs.tolist() for row in begun] == [[7, 0, 1, 2], [7, 4, 5, 6]] and begun[0].targets[0] == 0
    ahead = cut_rows(documents, 4, 2, None, 7)
    assert [row.inputs.tolist() for row in ahead] == [[7, 0, 1, 2, 3], [4, 5, 6, 7]]
    assert [row.targets.tolist() for row in ahead] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(ValueError, match="no document of the haystack has two tokens"):
        cut_rows(Haystack((np.arange(1),)), 4, 2, None)


def plain(model, row, buckets, length):
    """−log softmax at the targets, from all logits."""
    inputs = jnp.asarray(row.inputs)[None]
    read = jax.jit(
        lambda tokens: model.text_logits(model.hidden(tokens, tokens < 0, jnp.arange(tokens.shape[1])[None]))
    )
    logs = jax.nn.log_softmax(read(inputs)[0], axis=-1)
    nll = -np.asarray(logs)[np.arange(len(row.targets)) + len(row.inputs) - len(row.targets), row.targets]
    which = np.arange(len(nll)) * buckets // length
    return np.array([nll[which == bucket].sum() for bucket in range(buckets)])


@pytest.mark.parametrize("length, buckets, read_first", [(48, 6, None), (50, 7, None), (48, 6, 3)])
def test_the_plain_formula(form, length, buckets, read_first):
    rows = cut_rows(small.haystack(form), length, 2, None, read_first)
    rows[1] = rows[1]._replace(inputs=rows[1].inputs[:30], targets=rows[1].targets[:30])
    losses = Losses(form.model, length, buckets, len(rows[0].inputs) - length)
    for row in rows:
        sums, counts = losses([row])
        np.testing.assert_allclose(sums[0], plain(form.model.model, row, buckets, length), rtol=1e-5)
        assert counts.sum() == len(row.targets)


@pytest.mark.parametrize(
    "axes, layout",
    [
        ((1, 2, 2, 2), "zigzag"),
        pytest.param((1, 1, 1, 4), "striped", marks=pytest.mark.slow),
        pytest.param((2, 1, 1, 4), "contiguous", marks=pytest.mark.slow),
    ],
)
def test_any_mesh(form, tmp_path, axes, layout):
    rows = cut_rows(small.haystack(form), 50, 2, None)
    alone = np.concatenate([Losses(form.model, 50, 5)([row])[0] for row in rows])
    model = TextModel.load(small.folder(tmp_path), dtype="float32", parallel=Parallel(cases.mesh(*axes), layout))
    losses = Losses(model, 50, 5)
    found = [losses(rows[i : i + losses.rows])[0] for i in range(0, 2, losses.rows)]
    np.testing.assert_allclose(np.concatenate(found), alone, rtol=1e-5)


def test_a_window_sees_less(form):
    row = cut_rows(small.haystack(form), 48, 1, None)[0]
    narrow = dataclasses.replace(form.model, model=with_config(form.model.model, window=8))
    sums, _ = Losses(narrow, 48, 6)([row])
    np.testing.assert_allclose(sums[0], plain(narrow.model, row, 6, 48), rtol=1e-5)
    whole = plain(form.model.model, row, 6, 48)
    assert sums[0, 0] == pytest.approx(whole[0], rel=1e-5)  # the first eight see all there is
    assert np.all(abs(sums[0, 1:] / whole[1:] - 1) > 1e-3)
