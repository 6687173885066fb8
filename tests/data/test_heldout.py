"""The split by captions: the same for variants of a concept, of about the wanted share, and fixed for good."""

import pytest

from ringjax.data.heldout import concept, heldout, side_of


def test_variants_of_a_concept_are_on_one_side():
    variants = ["Red fox", "a red FOX", "a ｒｅｄ fox, black and white", "the red fox black and white", " red  fox. "]
    assert {concept(caption) for caption in variants} == {"red fox"}
    assert concept("Two foxes") == concept("two fox") and concept("glass") == "glass"
    assert concept("man dancing") == concept("women dancing") == "dancing"
    assert concept("black and white") == "black and white" and concept("The people") == "people"
    assert concept("black and white cat") == "cat"


def test_the_share_is_about_what_was_asked_and_grows_with_it():
    captions = [f"thing number {i}" for i in range(4000)]
    few, many = ({c for c in captions if heldout(c, share)} for share in (0.05, 0.2))
    assert 150 < len(few) < 250 and 700 < len(many) < 900
    assert {side_of(c, 0.05) for c in few} == {"heldout"} and {side_of(c, 0.05) for c in many - few} == {"train"}
    assert few < many, "what a small share keeps aside, a larger one does too"
    assert not any(heldout(c, 0) for c in captions) and all(heldout(c, 1) for c in captions)


def test_the_rule_does_not_change():
    # Another rule would mix what older checkpoints have seen with what they are tested on.
    kept = [c for c in (f"thing number {i}" for i in range(100)) if heldout(c, 0.05)]
    assert kept == ["thing number 8", "thing number 61", "thing number 71", "thing number 75", "thing number 99"]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), True])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="must lie between 0"):
        heldout("cat", share)
