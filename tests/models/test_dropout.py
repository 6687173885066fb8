"""Dropout: its share, its mean, and that a token's mask is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.attention import layouts
from ringjax.models.config import ModelConfig
from ringjax.models.dropout import ATTENTION, EMBEDDING, FEED_FORWARD, Dropout
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Rotations, Transformer, unstacked
from ringjax.training.mesh import make_mesh

BATCH, LENGTH, WIDTH = 4, 32, 64


def masks(layout="striped", mesh=None, first_row=0, rate=0.25, site=ATTENTION, layer=0):
    parallel = Parallel(mesh, layout)
    dropout = Dropout.of(rate, jax.random.key(0), first_row, BATCH, LENGTH, parallel)
    return np.asarray(dropout(jnp.ones((BATCH, LENGTH, WIDTH)), site, layer))


def test_the_share_that_is_dropped_and_the_mean():
    found = masks()
    assert set(np.unique(found)) == {np.float32(0), np.float32(1 / 0.75)}
    error = 4 * np.sqrt(0.25 * 0.75 / found.size)  # of a share, four standard deviations
    assert np.mean(found == 0) == pytest.approx(0.25, abs=error)


def test_every_token_site_and_layer_has_a_mask_of_its_own():
    found = masks()
    assert len(np.unique(found.reshape(-1, WIDTH), axis=0)) == BATCH * LENGTH
    assert (found != masks(site=FEED_FORWARD)).any() and (found != masks(layer=1)).any()


@pytest.mark.parametrize("layout", ["striped", "zigzag", "contiguous"])
def test_a_mask_goes_with_its_token(layout):
    mesh = make_mesh("2,1,1,4")
    found = jax.jit(lambda: masks_on(layout, mesh))()
    np.testing.assert_array_equal(layouts.get(layout).restore(np.asarray(found), 4), masks())


def masks_on(layout, mesh):
    dropout = Dropout.of(0.25, jax.random.key(0), 0, BATCH, LENGTH, Parallel(mesh, layout))
    return dropout(jnp.ones((BATCH, LENGTH, WIDTH)), ATTENTION)


def test_rows_count_through_the_micro_batches():
    np.testing.assert_array_equal(masks()[2:], masks(first_row=2)[:2])


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="dropout .* must be at least 0 and below 1"):
        ModelConfig(width=32, ffn_width=48, layers=1, heads=4, dropout=rate)


def test_the_model_drops_at_each_layers_own_masks():
    """Against the blocks one after the other, by the formula: x + dropout(attention), x + dropout(feed-forward)."""
    config = ModelConfig(
        width=32, ffn_width=48, layers=2, heads=4, vocab_size=64, vision_vocab_size=0, dtype="float32", dropout=0.25
    )
    model = Transformer.create(config, 0)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, 64)
    vision, positions = jnp.zeros(tokens.shape, bool), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    dropout, parallel = Dropout.of(0.25, jax.random.key(0), 0, BATCH, LENGTH, Parallel()), Parallel()
    rope = Rotations.of(positions, config)
    x = dropout(model._embed(tokens, vision, parallel), EMBEDDING)
    for layer, block in enumerate(unstacked(model).h):
        q, k, v, _ = block.attention.project(block.attention_norm(x), rope, parallel)
        x = x + dropout(block.attention.output(parallel.attend(q, k, v, None), parallel), ATTENTION, layer)
        x = x + dropout(block.feed_forward(block.ffn_norm(x), parallel), FEED_FORWARD, layer)
    found = model.hidden(tokens, vision, positions, dropout=dropout)
    np.testing.assert_allclose(found, model.ln_f(x), rtol=1e-5, atol=1e-5)
