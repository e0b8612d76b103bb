"""Sampling: which tokens stay, exact probabilities by a chi-square test, and independence of a row from its company."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.sampling import Sampling, filter_logits, sample_tokens

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))


def kept(top_k=0, top_p=1.0):
    filtered = filter_logits(LOGITS, jnp.array([top_k]), jnp.array([top_p]))
    return set(np.flatnonzero(np.isfinite(np.asarray(filtered[0]))).tolist())


def test_filters_keep_the_most_likely():
    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=1) == {1}
    assert kept(top_k=3) == {1, 3, 4}
    assert kept(top_p=0.5) == {1, 3}
    assert kept(top_p=0.01) == {1}
    assert kept(top_k=2, top_p=0.99) == {1, 3}
    assert kept(top_p=0.7) == {1, 3, 4}, "0.4 + 0.25 does not reach 0.7"


def settings(rows, temperature=1.0, top_k=0, top_p=1.0):
    return Sampling(jnp.full(rows, temperature), jnp.full(rows, top_k), jnp.full(rows, top_p))


def test_temperature_zero_is_greedy():
    keys = jax.random.split(jax.random.key(0), 20)
    assert set(np.asarray(sample_tokens(jnp.repeat(LOGITS, 20, axis=0), settings(20, 0.0), keys)).tolist()) == {1}


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ({"temperature": 0.5}, np.array([0.01, 0.16, 0.0025, 0.0625, 0.04]) / 0.275),
    ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ({"top_p": 0.8}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
])  # fmt: skip
def test_draws_follow_the_exact_probabilities(options, expected):
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    tokens = np.asarray(sample_tokens(jnp.repeat(LOGITS, draws, axis=0), settings(draws, **options), keys))
    counts, expected = np.bincount(tokens, minlength=5), np.asarray(expected) * draws
    assert np.all(counts[expected == 0] == 0)
    possible = expected > 0
    chi_square = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    assert chi_square < 20, f"chi-square {chi_square:.1f} at {possible.sum() - 1} degrees of freedom; above 20 is under 1 in 2,000"


def test_a_row_draws_the_same_in_any_company():
    keys = jax.random.split(jax.random.key(2), 6)
    logits = jax.random.normal(jax.random.key(3), (6, 30))
    together = sample_tokens(logits, settings(6), keys)
    for row in range(6):
        alone = sample_tokens(logits[row : row + 1], settings(1), keys[row : row + 1])
        assert int(alone[0]) == int(together[row])
