"""The blocked MLP of the experts against three grouped matmuls: values and gradients, groups empty, huge and off the block sizes."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.expert_mlp import ExpertWeights, expert_mlp, expert_mlp_blocked, expert_mlp_reference
from moejax.ops.grouped import SPARE_ROWS

SIZES = {"off every block": [1, 31, 33, 67], "empty ones": [0, 70, 0, 5], "all in the last": [0, 0, 0, 40], "large": [300, 256, 512, 91]}


@pytest.mark.parametrize("spare", [0, SPARE_ROWS])
@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients_equal_the_reference(name, spare):
    sizes = jnp.array(SIZES[name], jnp.int32)
    count, width, feed_forward = int(sizes.sum()), 6, 10
    random = np.random.default_rng(0)
    rows = jnp.asarray(random.normal(size=(count + spare, width)), jnp.float32)
    shapes = [(4, feed_forward, width), (4, feed_forward, width), (4, width, feed_forward)]
    weights = ExpertWeights(*(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes))
    cotangent = jnp.asarray(random.normal(size=rows.shape), jnp.float32).at[count:].set(0)

    def run(function):
        value, pull = jax.vjp(lambda rows, weights: function(rows, weights, sizes, spare), rows, weights)
        row_gradient, weight_gradient = pull(cotangent)
        return value[:count], row_gradient[:count], weight_gradient

    expected = jax.jit(lambda: run(expert_mlp_reference))()
    for function in (expert_mlp_blocked, expert_mlp):
        for ours, theirs in zip(jax.tree.leaves(jax.jit(lambda f=function: run(f))()), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, float(jnp.max(jnp.abs(theirs)))))
