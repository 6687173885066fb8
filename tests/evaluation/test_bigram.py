import numpy as np
import pytest

from ringjax.evaluation.bigram import bigram_chances, bigram_loss


def test_chances_are_counts_smoothed_towards_single_tokens():
    documents = [np.array([0, 1, 0, 1, 2]), np.array([0, 1])]
    chances = bigram_chances(documents, 4, strength=2.0)
    single = np.array([1, 3, 1, 0]) + 1.0
    single /= single.sum()
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    np.testing.assert_allclose(chances[0], (np.array([0, 3, 0, 0]) + 2 * single) / 5)
    np.testing.assert_allclose(chances[3], single)  # never seen: nothing but the single-token chances


def test_loss_finds_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(0)
    table = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.5, 0.0, 0.5]])

    def walk(length):
        ids = [0]
        for _ in range(length):
            ids.append(rng.choice(3, p=table[ids[-1]]))
        return np.array(ids)

    weights = np.linalg.matrix_power(table, 100)[0]
    logs = np.log(table, where=table > 0, out=np.zeros_like(table))
    entropy = -np.sum(weights[:, None] * table * logs)
    assert bigram_loss([walk(20000)], [walk(20000)], 3) == pytest.approx(entropy, abs=0.02)
