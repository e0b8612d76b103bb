"""Routing weights, the families' two rules for one expert, and the load-balance losses at known points."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.routing import RouterStatistics, load_balance_loss, route, router_statistics


@pytest.mark.parametrize("per_token", [2, 3, 5])
def test_weights_are_the_softmax_over_the_chosen_logits(per_token):
    logits = jax.random.normal(jax.random.key(0), (50, 5)) * 3
    routing = route(logits, per_token, "probability")
    chosen = np.take_along_axis(np.asarray(logits), np.asarray(routing.experts), axis=1)
    assert np.all(np.diff(chosen, axis=1) <= 0), "best expert first"
    assert np.array_equal(np.sort(routing.experts, axis=1), np.sort(np.argsort(-logits, axis=1)[:, :per_token], axis=1))
    np.testing.assert_allclose(routing.weights, jax.nn.softmax(chosen, axis=1), atol=1e-6)


def test_one_expert_has_weight_one_or_its_probability():
    logits = jax.random.normal(jax.random.key(0), (9, 4))
    np.testing.assert_allclose(route(logits, 1, "one").weights, np.ones((9, 1)))
    np.testing.assert_allclose(route(logits, 1, "probability").weights[:, 0], jax.nn.softmax(logits).max(axis=1), atol=1e-6)


def test_gradient_of_the_weights_is_that_of_indexing():
    logits, scale = jax.random.normal(jax.random.key(0), (6, 4)), jax.random.normal(jax.random.key(1), (6, 2))

    def by_indexing(logits):
        probabilities = jax.nn.softmax(logits)
        top, _ = jax.lax.top_k(probabilities, 2)
        return jnp.sum(scale * top / jnp.sum(top, axis=1, keepdims=True))

    ours = jax.grad(lambda x: jnp.sum(scale * route(x, 2, "one").weights))(logits)
    np.testing.assert_allclose(ours, jax.grad(by_indexing)(logits), atol=1e-6)


def test_a_bias_chooses_but_does_not_weigh():
    logits = jax.random.normal(jax.random.key(0), (20, 4))
    plain = route(logits, 2, "one")
    for ours, expected in zip(route(logits, 2, "one", jnp.zeros(4)), plain, strict=True):
        assert np.array_equal(ours, expected)
    lifted = route(logits, 2, "one", jnp.array([0.0, 0.0, 2.0, 1.0]))
    assert np.array_equal(lifted.experts, np.broadcast_to([2, 3], (20, 2)))
    np.testing.assert_allclose(lifted.weights, jax.nn.softmax(logits[:, 2:], axis=1), atol=1e-6)
    gradient = jax.grad(lambda bias: jnp.sum(route(logits, 2, "one", bias).weights[:, 0]))(jnp.array([0.1, 0.0, 0.0, 0.0]))
    assert not gradient.any()


def test_balance_and_collapse():
    """Perfect balance gives A pooled and A * L summed; all tokens on the same experts gives far more."""
    layers, experts, per_token = 3, 4, 2
    even = RouterStatistics(jnp.full((layers, experts), 1 / experts), jnp.full((layers, experts), per_token / experts), jnp.zeros(layers))
    assert float(load_balance_loss(even, "pooled")) == pytest.approx(per_token)
    assert float(load_balance_loss(even, "per_layer")) == pytest.approx(per_token * layers)
    collapsed = jnp.array([[0.5, 0.5, 0.0, 0.0]] * layers)
    skewed = RouterStatistics(collapsed, 2 * collapsed, jnp.zeros(layers))
    assert float(load_balance_loss(skewed, "pooled")) == pytest.approx(2 * per_token)
    assert float(load_balance_loss(skewed, "per_layer")) == pytest.approx(2 * per_token * layers)


def test_layers_that_balance_each_other_are_balanced_only_when_pooled():
    load = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    statistics = RouterStatistics(load, load, jnp.zeros(2))
    assert float(load_balance_loss(statistics, "pooled")) == pytest.approx(1.0)
    assert float(load_balance_loss(statistics, "per_layer")) == pytest.approx(4.0)


def test_statistics_count_only_the_rows_that_count():
    logits = jax.random.normal(jax.random.key(0), (8, 4))
    experts = route(logits, 2, "one").experts
    some = router_statistics(logits, experts, jnp.arange(8) < 5)
    alone = router_statistics(logits[:5], experts[:5], None)
    for ours, expected in zip(some, alone, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert float(jnp.sum(alone.load)) == pytest.approx(2.0)
    none = router_statistics(logits, experts, jnp.zeros(8, bool))
    assert all(np.all(np.asarray(value) == 0) for value in none), "no row that counts gives zeros, not NaN"
