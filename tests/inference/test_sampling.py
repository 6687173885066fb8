import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.inference.sampling import Sampling, guide, keep_top_k, keep_top_p, penalise, sample

CHANCES = np.array([0.5, 0.3, 0.15, 0.05])


def keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


def drawn(sampling: Sampling, count: int = 4000) -> np.ndarray:
    """Shares of the tokens among many draws from CHANCES."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(CHANCES, jnp.float32)), (count, 4))
    return np.bincount(sample(logits, keys(count), sampling), minlength=4) / count


def test_draws_follow_the_chances():
    np.testing.assert_allclose(drawn(Sampling()), CHANCES, atol=0.03)


def test_temperature_sharpens():
    sharp = CHANCES**2 / np.sum(CHANCES**2)
    np.testing.assert_allclose(drawn(Sampling(temperature=0.5)), sharp, atol=0.03)


def test_zero_temperature_takes_the_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    assert sample(logits, keys(2), Sampling(temperature=0)).tolist() == [1, 0]


def test_top_k_and_top_p_renormalise():
    np.testing.assert_allclose(drawn(Sampling(top_k=2)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(Sampling(top_p=0.85)), CHANCES * [1, 1, 1, 0] / 0.95, atol=0.03)
    np.testing.assert_allclose(drawn(Sampling(top_k=3, top_p=0.5)), [1, 0, 0, 0], atol=0)


@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.49, 1), (0.6, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_p(p, kept):
    shuffled = np.array([2, 0, 3, 1])
    logits = jnp.log(jnp.asarray(CHANCES[shuffled], jnp.float32))[None]
    finite = np.isfinite(keep_top_p(logits, p)[0])
    assert finite.tolist() == (shuffled < kept).tolist()


def test_min_p_is_a_share_of_the_likeliest():
    np.testing.assert_allclose(drawn(Sampling(min_p=0.5)), CHANCES * [1, 1, 0, 0] / 0.8, atol=0.03)
    np.testing.assert_allclose(drawn(Sampling(min_p=0.05)), CHANCES, atol=0.03)
    np.testing.assert_allclose(drawn(Sampling(min_p=1.0)), [1, 0, 0, 0], atol=0)
    with pytest.raises(ValueError, match="min_p 0 must be above 0"):
        Sampling(min_p=0)


def test_top_k_keeps_ties_and_allows_more_than_there_are():
    logits = jnp.asarray([[1.0, 2.0, 2.0, 0.0]])
    assert np.isfinite(keep_top_k(logits, 1)).tolist() == [[False, True, True, False]]
    assert np.isfinite(keep_top_k(logits, 99)).all()


def test_a_row_draws_alike_in_any_batch():
    logits = jax.random.normal(jax.random.key(1), (8, 32))
    together = sample(logits, keys(8), Sampling())
    assert sample(logits[3:5], keys(8)[3:5], Sampling()).tolist() == together[3:5].tolist()


def test_guidance_extrapolates():
    conditional, unconditional = jnp.asarray([1.0, 2.0]), jnp.asarray([0.0, 4.0])
    np.testing.assert_allclose(guide(conditional, unconditional, 3.0), [3.0, -2.0])
    np.testing.assert_allclose(guide(conditional, unconditional, 1.0), conditional)


def test_repetition_divides_what_is_above_zero_and_multiplies_what_is_below():
    logits = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
    seen = np.random.default_rng(1).random((3, 9)) < 0.5
    want = logits.copy()
    for row in range(3):
        for token in np.flatnonzero(seen[row]):
            want[row, token] = logits[row, token] / 1.5 if logits[row, token] > 0 else logits[row, token] * 1.5
    np.testing.assert_allclose(penalise(jnp.asarray(logits), seen, 1.5), want, rtol=1e-6)
    assert penalise(jnp.asarray([[0.0, -np.inf]]), np.array([[True, True]]), 2.0).tolist() == [[0.0, -np.inf]]


def test_the_penalty_comes_before_temperature():
    logits, seen = jnp.asarray([[2.0, 1.9, -1.0]]), np.array([[True, False, False]])
    penalty = Sampling(temperature=0, repetition_penalty=1.2)
    assert sample(logits, keys(1), penalty, seen).tolist() == [1]
    assert sample(logits, keys(1), penalty).tolist() == [0]
    assert sample(logits, keys(1), Sampling(temperature=0), seen).tolist() == [0]
    drawn_one = dict(temperature=0.3, top_k=1, repetition_penalty=1.2)
    assert sample(logits, keys(1), Sampling(**drawn_one), seen).tolist() == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(temperature=-1.0), "temperature -1.0 must be 0 or more"),
        (dict(temperature=float("nan")), "temperature nan"),
        (dict(top_k=0), "top_k 0 must be at least 1"),
        (dict(top_p=0.0), "top_p 0.0 must be above 0"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(guidance=float("inf")), "guidance inf"),
        (dict(seed=-1), "seed -1"),
        (dict(repetition_penalty=0.0), "repetition_penalty 0.0 must be above 0; 1 switches it off"),
        (dict(repetition_penalty=float("nan")), "repetition_penalty nan"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
