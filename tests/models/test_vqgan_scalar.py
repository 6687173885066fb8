"""Finite scalar quantization: codes and grid points, the gradient, files."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringjax.models import vqgan
from ringjax.models.vqgan.files import named_tensors
from ringjax.models.vqgan.scalar import bound, scalar_codes, scalar_entries

GRIDS = [(8, 5, 5, 5), (2, 3), (4, 4, 4), (7,), (2, 2, 2)]
LEVELS = (4, 3)
TINY = vqgan.VQGANConfig(
    resolution=8, channels=1, hidden=4, multipliers=(1, 2), res_blocks=1, z_channels=4, codes=12, code_dim=2,
    norm_groups=2, levels=LEVELS,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return vqgan.VQGAN(TINY, nnx.Rngs(0))


@pytest.mark.parametrize("levels", GRIDS)
def test_every_code_is_one_point_of_the_grid(levels):
    codes = np.arange(np.prod(levels))
    entries = np.asarray(scalar_entries(jnp.asarray(codes), levels))
    assert len(np.unique(entries, axis=0)) == len(codes)
    assert np.abs(entries).max() <= 1
    for values, count in zip(entries.T, levels):
        assert len(np.unique(values)) == count and 0 in values
    half_width = np.asarray(levels) // 2
    np.testing.assert_array_equal(scalar_codes(jnp.asarray(entries * half_width), levels), codes)  # and back


@pytest.mark.parametrize("levels", GRIDS)
def test_every_level_is_reached_and_none_beyond(levels):
    z = jnp.asarray(np.linspace(-50, 50, 20_001), jnp.float32)
    latents = jnp.stack([z] * len(levels), axis=-1)
    rounded = np.round(np.asarray(bound(latents, levels)))
    for values, count in zip(rounded.T, levels):
        expected = np.arange(count) - count // 2
        assert sorted(set(values)) == expected.tolist()
    codes = np.asarray(scalar_codes(bound(latents, levels), levels))
    assert codes.min() == 0 and codes.max() == np.prod(levels) - 1


def test_the_bound_is_the_formula_of_the_paper():
    """Appendix A.1, in float64."""
    levels, z = np.array([8, 5]), np.random.default_rng(0).normal(size=(20, 2)) * 2
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    expected = np.tanh(z + np.tan(offset / half)) * half - offset
    np.testing.assert_allclose(bound(jnp.asarray(z, jnp.float32), levels.tolist()), expected, atol=1e-5)


def test_codes_decode_to_what_training_saw(tiny):
    pixels = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1), minval=-1, maxval=1)
    out = tiny(pixels)
    codes = tiny.encode(pixels)
    np.testing.assert_array_equal(out.codes, codes)
    np.testing.assert_allclose(tiny.decode(codes), jnp.clip(out.pixels, -1, 1), atol=1e-5)
    assert out.commitment_loss == 0 and out.codebook_loss == 0


def test_the_gradient_passes_the_rounding(tiny):
    graph, state = nnx.split(tiny)
    pixels = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1), minval=-1, maxval=1)
    grads = jax.grad(lambda s: jnp.mean((nnx.merge(graph, s)(pixels).pixels - pixels) ** 2))(state)
    for part in ("encoder", "quant_conv", "decoder", "post_quant_conv"):
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads[part])), part
    assert "codebook" not in grads


def test_a_file_keeps_it(tiny, tmp_path):
    path = tmp_path / "fsq.safetensors"
    vqgan.save_vqgan(tiny, path)
    again = vqgan.load_vqgan(path)
    assert again.config == TINY and "quantize/embeddings" not in named_tensors(again)
    assert vqgan.vqgan_fingerprint(again) == vqgan.vqgan_fingerprint(tiny)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    codes = vqgan.encode_pictures(tiny, pictures)
    np.testing.assert_array_equal(vqgan.encode_pictures(again, pictures), codes)
    np.testing.assert_array_equal(vqgan.decode_pictures(again, codes), vqgan.decode_pictures(tiny, codes))


def test_other_levels_are_another_tokenizer(tiny):
    graph, state = nnx.split(tiny)
    other = nnx.merge(nnx.graphdef(vqgan.VQGAN.abstract(replace(TINY, levels=(3, 4)))), state)
    assert vqgan.vqgan_fingerprint(other) != vqgan.vqgan_fingerprint(tiny)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"levels": (4, 4)}, "levels [4, 4] make 16 codes of 2 dimensions, not codes 12 and code_dim 2; set these to"),
        ({"levels": (12,)}, "make 12 codes of 1 dimensions"),
        ({"levels": (12, 1)}, "1 must be an int from 2"),
        ({"levels": (4.0, 3)}, "4.0 must be an int from 2"),
        ({"levels": "43"}, "levels '43' must be a list"),
    ],
)
def test_levels_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TINY, **change)
