"""Pictures varied on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.training.image_tokenizer.augment import augment
from ringjax.training.image_tokenizer.step import background

WHITE = background("white", 3)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def pixels():
    return jax.random.uniform(jax.random.key(0), (32, 12, 12, 3), minval=-1, maxval=1)


def test_nothing_asked_nothing_done(pixels):
    np.testing.assert_array_equal(augment(KEY, pixels, WHITE, flip=False, shift=0, scale=0.0), pixels)


def test_about_half_are_mirrored(pixels):
    found = np.asarray(augment(KEY, pixels, WHITE, flip=True, shift=0, scale=0.0))
    mirrored = [np.array_equal(x, y[:, ::-1]) for x, y in zip(found, np.asarray(pixels))]
    same = [np.array_equal(x, y) for x, y in zip(found, np.asarray(pixels))]
    assert all(m != s for m, s in zip(mirrored, same)) and 6 < sum(mirrored) < 26


def test_a_shift_moves_whole_pixels_onto_the_background(pixels):
    found = np.asarray(augment(KEY, pixels, WHITE, flip=False, shift=2, scale=0.0))
    moves = []
    for x, y in zip(found, np.asarray(pixels)):
        framed = np.pad(y, ((2, 2), (2, 2), (0, 0)), constant_values=1.0)
        places = [(i, j) for i in range(5) for j in range(5) if np.allclose(x, framed[i:, j:][:12, :12], atol=1e-5)]
        assert len(places) == 1
        moves.append(places[0])
    assert len(set(moves)) > 10 and {i for i, _ in moves} == set(range(5))


def test_scaling_keeps_the_middle_and_the_range():
    pixels = jnp.full((16, 12, 12, 3), 1.0).at[:, 4:8, 4:8].set(-1.0)
    found = np.asarray(augment(KEY, pixels, WHITE, flip=False, shift=0, scale=0.4))
    assert found.min() >= -1 and found.max() <= 1
    dark = (found < 0).sum(axis=(1, 2, 3)) / 3
    assert dark.min() < 16 < dark.max()  # some smaller, some larger
    np.testing.assert_allclose(found, found[:, ::-1, ::-1], atol=1e-4)
    np.testing.assert_allclose(found[:, 0, 0], 1, atol=1e-5)


def test_colours():
    np.testing.assert_allclose(background("#ff0000", 3), [1, -1, -1])
    assert background("white", 1).tolist() == [1]
