"""FLOPs of a token: the published formulas, counted again another way."""

import dataclasses

import numpy as np
import pytest

from ringjax.models.sizes import SIZES, get_size
from ringjax.planning import flops
from ringjax.training.utilisation import useful_flops


@pytest.mark.parametrize("size", SIZES)
def test_a_row_costs_what_mfu_counts(size):
    model, context = get_size(size), 2**17
    row = useful_flops(model, model.parameter_count(), context, flops.pairs_per_row(context))
    # T²/2 pairs here, with the diagonal there.
    assert flops.per_token(flops.Shape.of(size, model), context) * context == pytest.approx(row, rel=1 / context)


def test_a_context_costs_a_narrow_model_more_and_a_wide_one_less():
    """The figure of the Ring Attention paper: falls from 1B to 1T, rises with the context, about 1 + T / (12·D)."""
    table = np.array([[flops.ratio(shape, context) for context in flops.CONTEXTS] for shape in flops.FAMILY])
    assert (np.diff(table, axis=0) < 0).all() and (np.diff(table, axis=1) > 0).all()
    for shape, ratios in zip(flops.FAMILY, table):
        rough = [(1 + t / 12 / shape.width) / (1 + 4096 / 12 / shape.width) for t in flops.CONTEXTS]
        np.testing.assert_allclose(ratios, rough, rtol=0.15)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 9, 100])
def test_pairs_of_a_row_are_those_of_its_mask(window):
    g = np.arange(9)
    seen = (g[None] <= g[:, None]) & (g[:, None] - g[None] < (window or 9))
    assert flops.pairs_per_row(9, window) == seen.sum()


def test_what_a_policy_computes_again():
    """By matrices: save_products none, full all but the last of the feed-forward, and attention once more."""
    model = get_size("7b")
    counted = {
        remat: flops.step_flops(dataclasses.replace(model, remat=remat), 4096)
        for remat in ("save_products", "save_feed_forward", "save_attention", "full")
    }
    head, width, inner = model.vocab_size * model.width, model.width, model.ffn_width
    matrices = {
        "save_products": 0,
        "save_feed_forward": 3 * width**2,
        "save_attention": 4 * width**2 + 2 * width * inner,
    }
    for remat, repeated in matrices.items():
        assert counted[remat].repeated == 2 * (32 * repeated + head)
    assert counted["full"].repeated == counted["save_attention"].repeated
    assert counted["full"].attention_forward == 2 * counted["save_attention"].attention_forward
    products = 6 * (32 * (4 * width**2 + 3 * width * inner) + head)
    assert all(found.products == products for found in counted.values())
