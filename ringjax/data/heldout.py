"""Which captions are kept aside: one rule for pictures, clips and the image tokenizer's own data.

    hash(words of the caption) / 2^64 < share        -> held out

It depends on the caption alone, so a concept is on the same side in every folder and for every program, and no
picture or clip has a caption that one of the other side has. Variants of a concept share its side: "Two red Foxes,
black and white" has the words of "two red fox", and "man dancing" those of "woman dancing".
"""

import hashlib
import re
import unicodedata
from typing import Literal

Side = Literal["train", "heldout"]
Split = Literal["all", "train", "heldout"]
SHARE = 0.1
_ARTICLES = {"a", "an", "the"}
_PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl"}


def concept(caption: str) -> str:
    """The words of a caption in lower case and singular, without articles, "black and white", and who does it."""
    plain = unicodedata.normalize("NFKC", caption).casefold()
    words = [_singular(word) for word in re.findall(r"\w+", plain) if word not in _ARTICLES]
    colourless = re.sub(r"\bblack and white\b", " ", " ".join(words)).split() or words
    return " ".join([word for word in colourless if word not in _PEOPLE] or colourless)


def _singular(word: str) -> str:
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def heldout(caption: str, share: float = SHARE) -> bool:
    """Whether a picture or clip of this caption is kept aside, so that about `share` of all captions are.

    Raises:
        ValueError: share is not a number from 0 to 1.
    """
    if isinstance(share, bool) or not 0 <= share <= 1:
        raise ValueError(f"heldout_share {share!r} must lie between 0 (nothing is kept aside) and 1")
    digest = hashlib.sha256(concept(caption).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def side_of(caption: str, share: float = SHARE) -> Side:
    """The side of a caption, by name."""
    return "heldout" if heldout(caption, share) else "train"
