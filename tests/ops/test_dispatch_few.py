"""Few rows through the experts that are touched: the dense reference's values, and nothing of other rows' experts."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.dispatch import apply_experts_chosen, apply_experts_dense, apply_experts_sorted
from moejax.ops.dispatch_few import FEW_ROWS, apply_experts_few, apply_experts_together
from moejax.ops.expert_mlp import ExpertWeights
from moejax.ops.routing import Routing, route

EXPERTS = 6


def make(rows, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(rows), 5)
    x, logits = jax.random.normal(keys[0], (rows, 8), dtype), jax.random.normal(keys[1], (rows, EXPERTS))
    gate, up = (jax.random.normal(key, (EXPERTS, 10, 8), dtype) for key in keys[2:4])
    return x, logits, ExpertWeights(gate, up, jax.random.normal(keys[4], (EXPERTS, 8, 10), dtype))


@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS])
@pytest.mark.parametrize("per_token", [1, 3, EXPERTS])
def test_values_are_the_reference_s(rows, per_token):
    x, logits, weights = make(rows)
    routing = route(logits, per_token, "probability")
    few = functools.partial(apply_experts_few, differentiable=apply_experts_sorted)
    expected = apply_experts_dense(x, routing, weights)
    for run in (few, apply_experts_chosen, apply_experts_together):
        np.testing.assert_allclose(jax.jit(run)(x, routing, weights), expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


def test_gradients_are_the_sorted_dispatch_s():
    x, logits, weights = make(4)

    def total(run, x, logits, weights):
        return jnp.sum(jnp.sin(run(x, route(logits, 2, "one"), weights)))

    ours, expected = (
        jax.jit(jax.grad(functools.partial(total, run), argnums=(0, 1, 2)))(x, logits, weights)
        for run in (apply_experts_chosen, apply_experts_sorted)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, expected)


def test_experts_of_other_rows_and_of_none_are_not_seen():
    """Infinite weights of an expert that another row chose, undefined ones of an expert that no row chose."""
    x, _, weights = make(3)
    routing = Routing(jnp.full((3, 2), 0.5), jnp.array([[0, 1], [2, 4], [1, 0]]))
    spoiled = ExpertWeights(*(part.at[4].set(jnp.inf).at[3].set(jnp.nan) for part in weights))
    for run in (apply_experts_chosen, apply_experts_together):
        clean, out = (jax.jit(run)(x, routing, part) for part in (weights, spoiled))
        assert np.array_equal(out[jnp.array([0, 2])], clean[jnp.array([0, 2])])
        assert not np.isfinite(out[1]).any()


def test_together_leaves_out_experts_that_lie_elsewhere():
    """The first and the last three of six experts, each counted from its own first one, make up the sum of all six."""
    x, logits, weights = make(7)
    routing = route(logits, 3, "one")
    parts = (
        apply_experts_together(
            x, Routing(routing.weights, routing.experts - first), ExpertWeights(*(one[first : first + 3] for one in weights))
        )
        for first in (0, 3)
    )
    expected = apply_experts_dense(x, routing, weights)
    np.testing.assert_allclose(sum(parts), expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


def test_bfloat16_is_summed_in_float32():
    x, logits, weights = make(4, jnp.bfloat16)
    routing = route(logits, 2, "one")
    out = jax.jit(apply_experts_chosen)(x, routing, weights)
    assert out.dtype == jnp.bfloat16
    expected = jax.jit(apply_experts_sorted)(x, routing, weights).astype(jnp.float32)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02 * float(jnp.max(jnp.abs(expected))))
