"""Digits in words and drawn: what a run writes about held-out ones, and whether a classifier knows its drawings."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from ringjax.data import samples
from ringjax.inference.sampling import Sampling
from ringjax.inference.trained import TrainedRun


class Captions(NamedTuple):
    """Held-out digits and what the model wrote about them."""

    images: UInt8[np.ndarray, "n 28 28"]
    written: list[str]
    right: Bool[np.ndarray, " n"]


class Drawings(NamedTuple):
    """Digits drawn from words, `count` of each word in turn, and what the classifier took them for."""

    images: UInt8[np.ndarray, "n 28 28"]
    labels: Int[np.ndarray, " n"]
    recognised: Int[np.ndarray, " n"]
    classifier: float
    """Share of the real held-out digits that the classifier recognises: its own limit."""

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Which drawings were taken for what they should be."""
        return self.labels == self.recognised


def caption_digits(run: TrainedRun, *, count: int | None = None) -> Captions:
    """The likeliest words for the held-out digits (all, or the first `count`)."""
    images, labels = (array[:count] for array in samples.digits("heldout"))
    written = [words.strip() for words in run.describe(run.to_codes(images), max_new_tokens=4)]
    wanted = [samples.digit_caption(label) for label in labels]
    return Captions(images, written, np.array([a == b for a, b in zip(written, wanted)]))


def draw_digits(run: TrainedRun, *, count: int, sampling: Sampling) -> Drawings:
    """`count` drawings of every digit's word, all of them judged: none is left out or drawn again."""
    labels = np.repeat(np.arange(10), count)
    codes = run.draw([samples.digit_caption(label) for label in labels], sampling=sampling)
    images = run.to_pictures(codes)
    judge, real = classifier(), samples.digits("heldout")
    accuracy = judge.score(_pixels(real.images), real.labels)
    return Drawings(images, labels, judge.predict(_pixels(images)).astype(np.int64), float(accuracy))


@functools.cache
def classifier():
    """The judge: a support vector machine on the pixels of the real training digits; needs scikit-learn."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise ImportError("judging drawings needs scikit-learn: pip install 'ringjax[quickstart]'") from None
    real = samples.digits("train")
    return SVC(C=10, gamma=0.025).fit(_pixels(real.images), real.labels)


def _pixels(images: UInt8[np.ndarray, "n 28 28"]):
    return images.reshape(len(images), -1) / 255
