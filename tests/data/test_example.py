"""Frames inside an example, and what their tokens may see."""

import numpy as np
import pytest

from ringjax.data.errors import DataError
from ringjax.data.example import Example, frame_spans, require_usable, see_whole_frames


def example(tokens, modality, loss=None) -> Example:
    loss = np.zeros(len(tokens), bool) if loss is None else np.asarray(loss, bool)
    return Example(np.asarray(tokens, np.int32), np.asarray(modality, bool), loss)


VIDEO = example([1, 5, 6, 100, 7, 8, 101, 2], [0, 1, 1, 1, 1, 1, 1, 0])


def test_frames_end_with_their_mark():
    assert frame_spans(VIDEO, 100).tolist() == [[1, 4], [4, 7]]


def test_frames_without_marks_end_with_the_vision():
    assert frame_spans(example([5, 6, 1, 7], [1, 1, 0, 1]), 100).tolist() == [[0, 2], [3, 4]]
    assert frame_spans(example([1, 2], [0, 0]), 100).tolist() == []


def test_frames_without_loss_see_to_their_end():
    assert see_whole_frames(VIDEO, 100).ahead.tolist() == [0, 2, 1, 0, 2, 1, 0, 0]


def test_frames_with_loss_stay_causal():
    learned = example(VIDEO.tokens, VIDEO.modality, [0, 0, 0, 0, 0, 0, 1, 1])
    assert see_whole_frames(learned, 100).ahead.tolist() == [0, 2, 1, 0, 0, 0, 0, 0]


def test_examples_that_teach_nothing_are_refused():
    with pytest.raises(DataError, match="f line 1: the example has 1 token"):
        require_usable(example([1], [0], [1]), "f line 1")
    with pytest.raises(DataError, match="no token bears loss"):
        require_usable(example([1, 2], [0, 0], [1, 0]), "f line 1")
    assert example([1, 2, 3], [0, 0, 0], [1, 0, 1]).loss_tokens == 1
