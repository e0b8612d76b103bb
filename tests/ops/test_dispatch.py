"""Sorted dispatch against the dense reference: values and gradients, however skewed the routing."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.dispatch import apply_experts, sort_by_expert, spread_rows
from moejax.ops.expert_mlp import ExpertWeights
from moejax.ops.grouped import SPARE_ROWS
from moejax.ops.matmul import InputMajor
from moejax.ops.routing import Routing, route
from moejax.ops.rows import combine_rows

EXPERTS, WIDTH, FEED_FORWARD = 6, 8, 10


def make(rows, per_token, skew):
    keys = jax.random.split(jax.random.key(rows), 5)
    logits = jax.random.normal(keys[0], (rows, EXPERTS))
    if skew == "all to one":
        logits = logits.at[:, 3].add(100.0)
    if skew == "one gets none":
        logits = logits.at[:, 0].add(-100.0)
    shape = (EXPERTS, FEED_FORWARD, WIDTH)
    weights = ExpertWeights(
        jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape), jax.random.normal(keys[3], (EXPERTS, WIDTH, FEED_FORWARD))
    )
    return jax.random.normal(keys[4], (rows, WIDTH)), logits, weights, per_token


@pytest.mark.parametrize("skew", ["none", "all to one", "one gets none"])
@pytest.mark.parametrize("per_token", [1, 2, EXPERTS])
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 40])  # few rows: test_dispatch_few.py
def test_sorted_equals_dense(rows, per_token, skew):
    x, logits, weights, per_token = make(rows, per_token, skew)

    def total(kind, x, logits, weights):
        out = apply_experts(x, route(logits, per_token, "probability"), weights, kind)
        return jnp.sum(jnp.sin(out)), out

    def run(kind):
        return jax.jit(jax.grad(lambda *args: total(kind, *args), argnums=(0, 1, 2), has_aux=True))(x, logits, weights)

    for ours, expected in zip(jax.tree.leaves(run("sorted")), jax.tree.leaves(run("dense")), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5 * max(1.0, float(jnp.max(jnp.abs(expected)))))


@pytest.mark.parametrize("kind", ["sorted", "dense"])
@pytest.mark.parametrize("rows", [3, 40])
def test_input_major_weights_give_the_same(rows, kind):
    x, logits, weights, _ = make(rows, 2, "none")
    turned = ExpertWeights(*(InputMajor(weight.swapaxes(1, 2)) for weight in weights))
    run = jax.jit(lambda weights: apply_experts(x, route(logits, 2, "one"), weights, kind))
    expected = run(weights)
    np.testing.assert_allclose(run(turned), expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


def test_every_choice_is_computed_once():
    """Identity experts with distinct scales: the output is the weighted sum of exactly the chosen scales, for every row."""
    experts = jnp.array([[0, 5], [5, 0], [2, 3], [0, 1]])
    order, place = sort_by_expert(experts)
    assert np.array_equal(np.asarray(experts).reshape(-1)[order], np.sort(np.asarray(experts).reshape(-1)))
    assert np.array_equal(np.asarray(order)[place], np.arange(8))


def test_permuted_experts_give_the_same_output():
    x, logits, weights, _ = make(30, 2, "none")
    permutation = jnp.array([4, 2, 0, 5, 1, 3])
    routing = route(logits, 2, "one")
    moved = ExpertWeights(*(weight[permutation] for weight in weights))
    renamed = Routing(routing.weights, jnp.argsort(permutation)[routing.experts].astype(jnp.int32))
    np.testing.assert_allclose(apply_experts(x, routing, weights, "sorted"), apply_experts(x, renamed, moved, "sorted"), atol=1e-4)


def test_moves_of_rows_have_the_gradient_of_indexing():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    order, place = sort_by_expert(jnp.array([[1, 0], [2, 1], [0, 2], [1, 2], [0, 1]]))
    scale, weights = jax.random.normal(jax.random.key(1), (10, 3)), jax.random.uniform(jax.random.key(2), (5, 2))
    choice = jnp.pad(order, (0, SPARE_ROWS), constant_values=10)  # spare rows behind

    def ours(x: jax.Array, weights: jax.Array) -> jax.Array:
        moved = jnp.pad(scale, ((0, SPARE_ROWS), (0, 0))) * jnp.sin(spread_rows(x, order, place))
        return jnp.sum(jnp.cos(combine_rows(weights, moved, place, choice)))

    def plain(x: jax.Array, weights: jax.Array) -> jax.Array:
        moved = (scale * jnp.sin(x[order // 2]))[place].reshape(5, 2, 3)
        return jnp.sum(jnp.cos(jnp.sum(weights[:, :, None] * moved, axis=1)))

    for made, expected in zip(jax.grad(ours, (0, 1))(x, weights), jax.grad(plain, (0, 1))(x, weights), strict=True):
        np.testing.assert_allclose(made, expected, atol=1e-6)


def test_unknown_dispatch_is_refused():
    x, logits, weights, _ = make(2, 1, "none")
    with pytest.raises(Exception, match=r"unknown dispatch|kind"):
        apply_experts(x, route(logits, 1, "one"), weights, "fancy")  # type: ignore[arg-type]
