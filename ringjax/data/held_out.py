"""Which examples are held out, by a hash of their caption: the same on every machine, whatever else is in the data."""

import hashlib
import unicodedata
from typing import Literal

Side = Literal["train", "heldout"]


def normalised(caption: str) -> str:
    """A caption without what two writings of the same words differ in: case, spacing, punctuation at the ends."""
    words = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return words.strip(" .,;:!?\"'()")


def side_of(caption: str, heldout_share: float) -> Side:
    """`heldout` for about `heldout_share` of all captions; equal ones after `normalised` are on one side."""
    digest = hashlib.sha256(normalised(caption).encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < heldout_share * 2**64 else "train"
