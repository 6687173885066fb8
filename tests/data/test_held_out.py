"""Which captions are held out."""

import pytest

from ringjax.data.held_out import normalised, side_of


@pytest.mark.parametrize("other", ["a Red  ball", "A red ball.", " a red\tball\n", "a ｒｅｄ ball", "\"A red ball!\""])
def test_the_same_words_are_on_one_side(other):
    assert normalised(other) == "a red ball"
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert side_of(other, share) == side_of("a red ball", share)


def test_about_the_share_is_held_out_and_more_of_it_keeps_the_rest():
    captions = [f"picture number {i}" for i in range(4000)]
    few = {c for c in captions if side_of(c, 0.1) == "heldout"}
    more = {c for c in captions if side_of(c, 0.2) == "heldout"}
    assert 330 < len(few) < 470 and 700 < len(more) < 900  # five standard deviations
    assert few < more
    assert {side_of(c, 0.0) for c in captions} == {"train"}


def test_sides_do_not_change_between_versions():
    assert [side_of(c, 0.5) for c in ("ant", "bee", "cat", "dog", "emu")] == [
        "heldout", "heldout", "heldout", "train", "train",
    ]  # fmt: skip
