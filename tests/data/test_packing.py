"""Packing loses nothing, doubles nothing, mixes nothing."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ringjax.attention import Reach
from ringjax.data.example import Example, see_whole_frames
from ringjax.data.packing import Piece, assemble, cut, empty_batch, first_fit
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training.loss import cross_entropy
from tests.data.helpers import unique_example

VISION_CODES = 50


def pack(examples, seq_len: int, most_open: int, **options) -> list[list[Piece]]:
    pieces = [p for example in examples for p in cut(example, seq_len, vision_codes=VISION_CODES, **options)]
    return list(first_fit(iter(pieces), seq_len, [], most_open))


def pairs_of(batch: dict) -> Counter:
    """Each (token, target, bears loss) in the batch, padding left out."""
    real = batch["behind"] >= 0
    return Counter(
        zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), batch["loss_weights"][real] > 0)
    )


def pairs_of_examples(examples) -> Counter:
    return Counter(
        pair for e in examples for pair in zip(e.tokens[:-1].tolist(), e.tokens[1:].tolist(), e.loss[1:].tolist())
    )


@st.composite
def corpora(draw):
    """Examples of text and frames, some longer than a row; every token occurs once."""
    examples, used = [], 0
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(2, 60))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        modality = np.repeat(rng.random(length) < 0.5, rng.integers(1, 6, length))[:length]
        tokens = np.arange(used, used + length, dtype=np.int32) + 1000
        examples.append(Example(tokens, modality, rng.random(length) < 0.6))
        used += length
    return examples


@given(corpora(), st.integers(1, 40), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_no_pair_is_lost_or_doubled(examples, seq_len, most_open):
    rows = pack(examples, seq_len, most_open)
    batch = assemble(rows, len(rows), seq_len)
    assert pairs_of(batch) == pairs_of_examples(examples)
    assert np.all(batch["loss_weights"][batch["behind"] < 0] == 0)


@given(corpora(), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_nobody_sees_another_example(examples, seq_len):
    examples = [see_whole_frames(example, VISION_CODES) for example in examples]
    rows = pack(examples, seq_len, 3)
    batch = assemble(rows, len(rows), seq_len)
    index = np.arange(seq_len)
    for row, pieces in enumerate(rows):
        owner = np.full(seq_len, -1)
        owner[: sum(map(len, pieces))] = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        for i in np.flatnonzero(owner >= 0):
            seen = owner[index[i] - batch["behind"][row, i] : index[i] + batch["ahead"][row, i] + 1]
            assert set(seen) == {owner[i]}
            assert batch["behind"][row, i] == batch["positions"][row, i]


@given(corpora(), st.integers(1, 40), st.sampled_from(["example", "token"]))
@settings(max_examples=50, deadline=None)
def test_weights_of_an_example_sum_to_its_pieces(examples, seq_len, weights):
    for example in examples:
        pieces = cut(example, seq_len, vision_codes=VISION_CODES, weights=weights)
        total = sum(example.loss[p.start + 1 : p.stop + 1].sum() * p.weight for p in pieces)
        expected = example.loss_tokens if weights == "token" else len(pieces) * (example.loss_tokens > 0)
        np.testing.assert_allclose(total, expected, rtol=1e-12)


def test_a_row_in_full():
    rows = [[*cut(unique_example(1, 5), 8, vision_codes=9), *cut(unique_example(2, 4), 8, vision_codes=9)]]
    batch = assemble(rows, 1, 8)
    assert batch["tokens"][0].tolist() == [10000, 10001, 10002, 10003, 20000, 20001, 20002, 0]
    assert batch["targets"][0].tolist() == [10001, 10002, 10003, 10004, 20001, 20002, 20003, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch["behind"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, -1]
    assert batch["ahead"][0].tolist() == [0] * 8
    np.testing.assert_allclose(batch["loss_weights"][0], [1 / 4] * 4 + [1 / 3] * 3 + [0], rtol=1e-6)
    kinds = {name: array.dtype.name for name, array in batch.items()}
    assert kinds == {
        "tokens": "int32", "modality": "bool", "targets": "int32", "target_modality": "bool", "loss_weights": "float32",
        "positions": "int32", "behind": "int32", "ahead": "int32",
    }  # fmt: skip


def test_target_modality_is_the_targets():
    example = Example(np.arange(4, dtype=np.int32), np.array([0, 1, 1, 0], bool), np.ones(4, bool))
    batch = assemble([cut(example, 4, vision_codes=9)], 1, 4)
    assert batch["modality"][0].tolist() == [False, True, True, False]
    assert batch["target_modality"][0].tolist() == [True, True, False, False]


def test_a_window_shortens_the_reach():
    batch = assemble([cut(unique_example(0, 6), 5, vision_codes=9)], 1, 5, window=3)
    assert batch["behind"][0].tolist() == [0, 1, 2, 2, 2]


def test_a_span_is_cut_at_the_end_of_its_piece():
    frame = Example(np.arange(8, dtype=np.int32), np.ones(8, bool), np.zeros(8, bool))
    pieces = cut(see_whole_frames(frame, 100), 4, vision_codes=100)
    assert [(p.start, p.stop) for p in pieces] == [(0, 4), (4, 7)]
    batch = assemble([pieces[:1], pieces[1:]], 2, 4)
    assert batch["ahead"].tolist() == [[3, 2, 1, 0], [2, 1, 0, 0]]


def test_cuts_keep_frames_whole_where_they_can():
    frame = [7, 7, 7, VISION_CODES]
    tokens = np.array([1, 1, 1, *frame, *frame, *frame, 1, 1], np.int32)
    example = Example(tokens, np.array([0] * 3 + [1] * 12 + [0] * 2, bool), np.ones(17, bool))
    assert [(p.start, p.stop) for p in cut(example, 9, vision_codes=VISION_CODES)] == [(0, 7), (7, 16)]
    assert [(p.start, p.stop) for p in cut(example, 5, vision_codes=VISION_CODES)] == [
        (0, 3),
        (3, 7),
        (7, 11),
        (11, 16),
    ]
    # A cut right after a frame stays there.
    assert [(p.start, p.stop) for p in cut(example, 7, vision_codes=VISION_CODES)] == [(0, 7), (7, 11), (11, 16)]
    # A frame longer than a row has to be cut.
    assert [(p.start, p.stop) for p in cut(example, 2, vision_codes=VISION_CODES)][:4] == [
        (0, 2),
        (2, 3),
        (3, 5),
        (5, 7),
    ]


def test_pad_mode_gives_each_piece_a_row():
    rows = pack([unique_example(i, n) for i, n in enumerate((3, 9, 2))], 4, 0)
    assert [len(row) for row in rows] == [1] * 4


def test_more_open_rows_waste_less():
    rng = np.random.default_rng(0)
    examples = [unique_example(i, int(n)) for i, n in enumerate(rng.integers(2, 60, 400))]
    rows = [len(pack(examples, 64, most_open)) for most_open in (0, 1, 4, 16)]
    least = sum(example.pairs for example in examples) / 64
    assert rows[0] == 400 and rows == sorted(rows, reverse=True)
    assert rows[3] < 1.1 * least


def test_rows_without_pieces_are_padding():
    """And an example that sees ahead may lie beside one that does not."""
    picture = Example(np.array([1, 2, 9, 1], np.int32), np.array([0, 1, 1, 0], bool), np.zeros(4, bool))
    seen = see_whole_frames(picture, 9)
    batch = assemble([[], [*cut(unique_example(0, 3), 8, vision_codes=9), *cut(seen, 8, vision_codes=9)]], 3, 8)
    assert batch["behind"][1].tolist() == [0, 1, 0, 1, 2, -1, -1, -1]
    assert batch["ahead"][1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    empty = empty_batch(3, 8)
    for name, array in batch.items():
        np.testing.assert_array_equal(array[[0, 2]], empty[name][[0, 2]])
        np.testing.assert_array_equal(assemble([], 3, 8)[name], empty[name])


def test_overfull_rows_are_refused():
    pieces = cut(unique_example(0, 5), 4, vision_codes=9)
    with pytest.raises(ValueError, match="row 0 holds more than seq_len 4"):
        assemble([pieces * 2], 1, 4)
    with pytest.raises(ValueError, match="more than batch_size 1 rows"):
        assemble([pieces, pieces], 1, 4)


# ---------------------------------------------------------------------------------------------------------------------
# The packed loss and its gradient are those of the examples alone. Float32, relative 1e-5 (design: numbers).

CONFIG = ModelConfig(
    width=32, ffn_width=48, layers=2, heads=4, kv_heads=2, vocab_size=40, vision_vocab_size=VISION_CODES + 2,
    vision_codes=VISION_CODES, dtype="float32", loss_chunk=64, init_std=0.2,
)  # fmt: skip


def learnable(count: int, seed: int, longest: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        n = int(rng.integers(3, longest))
        modality = np.repeat(rng.random(n) < 0.5, rng.integers(2, 6, n))[:n]
        tokens = np.where(modality, rng.integers(0, VISION_CODES, n), rng.integers(0, 40, n)).astype(np.int32)
        loss = rng.random(n) < 0.5
        loss[-1] = True
        examples.append(Example(tokens, modality, loss))
    return examples


@jax.jit
def loss_and_gradient(state, batch):
    graph = nnx.graphdef(Transformer.abstract(CONFIG))

    def loss(state):
        model = nnx.merge(graph, state)
        reach = Reach(batch["behind"], batch["ahead"])
        hidden = model.hidden(batch["tokens"], batch["modality"], batch["positions"], reach)
        return cross_entropy(model, hidden, batch, parallel=Parallel()).loss

    return jax.value_and_grad(loss)(state)


def relative_error(a, b) -> float:
    norm = sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(b))
    difference = sum(
        float(np.sum(np.square(np.asarray(x, np.float64) - np.asarray(y, np.float64))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )
    return (difference / norm) ** 0.5


@pytest.mark.parametrize("weights", ["example", "token"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_loss_and_gradient_equal_the_unpacked(weights, bidirectional):
    seq_len, rows_alone = 24, 24
    examples = learnable(16, seed=1, longest=40)
    if bidirectional:
        examples = [
            see_whole_frames(dataclasses.replace(e, loss=e.loss & ~e.modality | (np.arange(len(e)) == len(e) - 1)), 50)
            for e in examples
        ]
        assert any(example.ahead.any() for example in examples)
    packed = pack(examples, seq_len, 4, weights=weights)
    alone = pack(examples, seq_len, 0, weights=weights)
    assert len(packed) < len(alone) <= rows_alone and max(map(len, packed)) > 1
    state = nnx.state(Transformer.create(CONFIG, seed=0))
    losses, gradients = zip(
        *(
            loss_and_gradient(state, assemble(rows, rows_alone, seq_len))
            for rows in (packed, alone)
        )
    )  # fmt: skip
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert relative_error(*gradients) < 1e-5


def test_the_example_weights_are_the_mean_of_means():
    """Against the definition: each example through the model by itself, its mean over loss tokens, their mean."""
    seq_len = 24
    examples = [e for e in learnable(12, seed=2, longest=24) if e.loss_tokens]
    state = nnx.state(Transformer.create(CONFIG, seed=0))
    alone = [
        float(loss_and_gradient(state, assemble([cut(e, seq_len, vision_codes=VISION_CODES)], 24, seq_len))[0])
        for e in examples
    ]
    packed = loss_and_gradient(state, assemble(pack(examples, seq_len, 4), 24, seq_len))[0]
    np.testing.assert_allclose(packed, np.mean(alone), rtol=1e-5)


def test_padding_changes_nothing():
    state = nnx.state(Transformer.create(CONFIG, seed=0))
    loss, gradient = loss_and_gradient(state, empty_batch(24, 24))
    assert loss == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
