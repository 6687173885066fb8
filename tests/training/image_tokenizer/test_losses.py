"""The losses: hinges, the adaptive weight, the perceptual distance, the discriminator."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from ringjax.training.image_tokenizer import losses
from ringjax.training.image_tokenizer.discriminator import PatchDiscriminator, smallest_picture
from ringjax.training.image_tokenizer.perceptual import (
    MEANS,
    load_features,
    perceptual_distance,
    shapes,
    vgg_features,
)


def test_hinges():
    real, fake = jnp.array([[2.0, 0.5]]), jnp.array([[-3.0, 0.5]])
    assert losses.discriminator_hinge(real, fake) == ((0 + 0.5) / 2 + (0 + 1.5) / 2) / 2
    assert losses.generator_hinge(fake) == 1.25
    assert losses.discriminator_hinge(jnp.zeros((1, 2)), jnp.zeros((1, 2))) == 1


@pytest.mark.parametrize("kind, expected", [("l1", 0.75), ("l2", 1.0)])
def test_reconstruction(kind, expected):
    a, b = jnp.array([0.0, 1.0, 0.5, -1.0]), jnp.array([0.5, 1.0, 0.5, 1.5])
    b = b.at[3].set(-1 + (2.5 if kind == "l1" else np.sqrt(3.75)))
    assert losses.reconstruction_loss(a, b, kind) == pytest.approx(expected)


def test_the_adaptive_weight_is_a_ratio_of_gradients():
    """Against the definition: both losses differentiated with respect to the last layer, through it."""
    keys = jax.random.split(jax.random.key(0), 4)
    features = jax.random.normal(keys[0], (2, 6, 6, 5))
    conv = nnx.Conv(5, 3, (3, 3), rngs=nnx.Rngs(0))
    target = jax.random.normal(keys[1], (2, 6, 6, 3))
    graph, weights = nnx.split(conv)
    near = lambda x: jnp.mean(jnp.abs(x - target))  # noqa: E731
    game = lambda x: -jnp.mean(jnp.sin(3 * x))  # noqa: E731

    def norm(loss):
        grads = jax.grad(lambda w: loss(nnx.merge(graph, w)(features)))(weights)
        return np.linalg.norm(np.asarray(grads["kernel"].get_value(), np.float64))

    pixels = conv(features)
    found = losses.adaptive_weight(features, conv.kernel[...], jax.grad(near)(pixels), jax.grad(game)(pixels))
    assert found == pytest.approx(norm(near) / (norm(game) + 1e-6), rel=1e-5)
    silent = losses.adaptive_weight(features, conv.kernel[...], jax.grad(near)(pixels), jnp.zeros_like(pixels))
    assert silent == 1e4  # of a discriminator that says nothing, bounded


# --- perceptual -----------------------------------------------------------------------------------------------------

LAYERS = ("conv1_2", "conv2_1")


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1)).astype(np.float32)
        for name, shape in shapes(LAYERS).items()
    }


def plain_conv(x, kernel, bias):
    """3 × 3, zeros around, ReLU, in float64."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((*x.shape[:2], kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            out += padded[i : i + x.shape[0], j : j + x.shape[1]] @ kernel[i, j].astype(np.float64)
    return np.maximum(out + bias, 0)


def plain_features(weights, picture):
    """Of an RGB picture in 0 … 255."""
    x = picture[..., ::-1].astype(np.float64) - MEANS  # blue first
    layer = lambda x, name: plain_conv(x, weights[f"{name}/kernel"], weights[f"{name}/bias"])  # noqa: E731
    first = layer(layer(x, "conv1_1"), "conv1_2")
    pooled = first.reshape(first.shape[0] // 2, 2, first.shape[1] // 2, 2, -1).max(axis=(1, 3))
    return first, layer(pooled, "conv2_1")


def test_the_perceptual_distance_is_the_plain_formula(weights):
    a, b = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8, 3))
    expected = 0.0
    for x, y in zip(a, b):
        for f, g in zip(plain_features(weights, x), plain_features(weights, y)):
            unit = lambda f: f / np.sqrt((f**2).sum(-1, keepdims=True) + 1e-10)  # noqa: E731
            expected += ((unit(f) - unit(g)) ** 2).sum(-1).mean() / len(a)
    found = perceptual_distance(weights, jnp.asarray(a) / 127.5 - 1, jnp.asarray(b) / 127.5 - 1, LAYERS)
    assert found == pytest.approx(expected, rel=1e-4)
    assert perceptual_distance(weights, jnp.asarray(a) / 127.5 - 1, jnp.asarray(a) / 127.5 - 1, LAYERS) == 0


def test_grey_is_seen_as_colour(weights):
    grey = jax.random.uniform(jax.random.key(0), (1, 8, 8, 1), minval=-1, maxval=1)
    for one, three in zip(*(vgg_features(weights, x, LAYERS) for x in (grey, jnp.repeat(grey, 3, -1)))):
        np.testing.assert_array_equal(one, three)


def test_pixels_without_features_have_a_gradient(weights):
    dead = {name: np.full_like(x, -1.0) if name.endswith("bias") else np.zeros_like(x) for name, x in weights.items()}
    a = jnp.zeros((1, 8, 8, 3))
    grads = jax.grad(lambda x: perceptual_distance(dead, x, a + 0.1, LAYERS))(a)
    assert np.isfinite(grads).all()


def test_weights_are_read_and_checked(weights, tmp_path):
    path = tmp_path / "vgg.safetensors"
    save_file({name: x.astype(np.float16) for name, x in weights.items()}, path)
    found = load_features(path, LAYERS)
    assert set(found) == set(weights) and found["conv2_1/kernel"].dtype == np.float32
    np.testing.assert_array_equal(found["conv1_1/bias"], weights["conv1_1/bias"].astype(np.float16))
    with pytest.raises(ValueError, match=re.escape("conv2_2/kernel is missing, not (3, 3, 128, 128)")):
        load_features(path, ("conv3_3",))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_features(path, LAYERS)
    with pytest.raises(FileNotFoundError, match="perceptual_weights .*gone.* set null"):
        load_features(tmp_path / "gone", LAYERS)


# --- discriminator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_patches(layers):
    size = smallest_picture(layers)
    judge = PatchDiscriminator(3, 4, layers, nnx.Rngs(0))
    assert judge(jnp.zeros((2, size, size, 3))).shape[0] == 2 and judge(jnp.zeros((1, size, size, 3))).size >= 1
    assert judge(jnp.zeros((1, 64, 64, 3))).shape[1] == 64 // 2**layers - 2


def test_a_score_does_not_depend_on_the_other_pictures():
    judge = PatchDiscriminator(3, 4, 2, nnx.Rngs(0))
    pictures = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    np.testing.assert_allclose(judge(pictures)[:1], judge(pictures[:1]), atol=1e-6)
