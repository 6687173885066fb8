"""What CLIP's vision transformer and LLaVA refuse; what they compute is compared in tests/interop/test_llava.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringjax.models import Parallel
from ringjax.models.clip import ClipConfig, ClipVision
from ringjax.models.llava import Llava, LlavaConfig, check_images
from tests.models import cases

VISION = ClipConfig(width=8, ffn_width=12, layers=2, heads=2, image_size=8, patch_size=4)
CONFIG = LlavaConfig(cases.SMALL, VISION, image_token=39, depths=(2,))


def test_features_of_a_row_are_those_of_its_pictures_in_turn():
    assert CONFIG.features == 4 and dataclasses.replace(CONFIG, select="full").features == 5
    graph, state = nnx.split(Llava.abstract(CONFIG))
    pixels = jax.ShapeDtypeStruct((2, 3, 8, 8, 3), jnp.float32)
    found = jax.eval_shape(lambda state, pixels: nnx.merge(graph, state).image_features(pixels), state, pixels)
    assert found.shape == (2, 12, cases.SMALL.width)


@pytest.mark.parametrize("pictures", [1, 4])
def test_pictures_are_cut_over_all_axes_but_tp(pictures):
    """Where there are fewer of them than devices, they are whole."""
    parallel = Parallel(cases.mesh(1, 1, 2, 4))
    model = ClipVision(VISION, nnx.Rngs(0))
    pixels = np.random.default_rng(0).standard_normal((pictures, 8, 8, 3)).astype(np.float32)
    run = lambda parallel: jax.jit(lambda x: model.hidden_states(x, (1, 2), parallel))(pixels)  # noqa: E731
    for found, expected in zip(run(parallel), run(Parallel())):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape, dtype, depths, message",
    [
        ((1, 8, 8, 1), "float32", (1,), r"pixels are float32\[1, 8, 8, 1\]; give floats \['B', 8, 8, 3\]"),
        ((1, 8, 8, 3), "uint8", (1,), r"pixels are uint8"),
        ((1, 8, 8, 3), "float32", (3,), r"depths \[3\] must be some of 1 … 2, the blocks of this model"),
        ((1, 8, 8, 3), "float32", (), r"depths \[\] must be"),
    ],
)
def test_pictures_and_depths_that_do_not_fit(shape, dtype, depths, message):
    with pytest.raises(ValueError, match=message):
        ClipVision.abstract(VISION).hidden_states(jnp.zeros(shape, dtype), depths)


def test_image_tokens_that_are_not_those_of_the_pictures():
    tokens = np.asarray([[39] * 4 + [1] * 5, [39] * 4 + [1] * 5])
    check_images(tokens, CONFIG, [1, 1])
    with pytest.raises(ValueError, match=r"row 1 has 4 image tokens \(id 39\) for 2 pictures of 4 features.* have 8"):
        check_images(tokens, CONFIG, [1, 2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depths": (3,)}, r"depths \(3,\) must be some of 1 … 2"),
        ({"select": "cls"}, "select 'cls' is not one of 'default', 'full'"),
        ({"activation": "relu"}, "activation 'relu' is not one of"),
        ({"image_token": -1}, "image_token -1 must be the id of a token"),
    ],
)
def test_configs_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
