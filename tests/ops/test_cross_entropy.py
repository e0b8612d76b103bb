"""The chunked loss against all logits at once: value, gradients, and that no [M, V] array is ever made."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.cross_entropy import cross_entropy, cross_entropy_reference, token_losses

ROWS, WIDTH, VOCABULARY = 37, 8, 50


def make(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (ROWS, WIDTH), dtype)
    head = jax.random.normal(keys[1], (VOCABULARY, WIDTH), dtype)
    targets = jax.random.randint(keys[2], (ROWS,), 0, VOCABULARY)
    weights = (jax.random.uniform(keys[3], (ROWS,)) > 0.3).astype(jnp.float32)
    return x, head, targets, weights


@pytest.mark.parametrize("chunk", [1, 10, 37, 512])
def test_value_and_gradients_equal_the_reference(chunk):
    x, head, targets, weights = make()
    ours = jax.value_and_grad(lambda x, h: 3.0 * cross_entropy(x, h, targets, weights, chunk), argnums=(0, 1))(x, head)
    expected = jax.value_and_grad(lambda x, h: 3.0 * cross_entropy_reference(x, h, targets, weights), argnums=(0, 1))(x, head)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cross_entropy(x, head, targets, weights, chunk), expected[0] / 3.0, rtol=1e-6)


def test_token_losses_sum_to_the_loss():
    x, head, targets, weights = make()
    np.testing.assert_allclose(jnp.sum(weights * token_losses(x, head, targets, 8)), cross_entropy(x, head, targets, weights), rtol=1e-6)


def test_bfloat16_input_gives_a_float32_loss_and_bfloat16_gradients():
    x, head, targets, weights = make(jnp.bfloat16)
    value, gradients = jax.value_and_grad(cross_entropy, argnums=(0, 1))(x, head, targets, weights)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]
    expected = cross_entropy_reference(x.astype(jnp.float32), head.astype(jnp.float32), targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-2)


def test_logits_of_all_rows_never_exist():
    """The compiled step's temporaries stay far under one float32 [M, V] array."""
    rows, vocabulary = 4096, 8192
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in [((rows, 16), jnp.float32), ((vocabulary, 16), jnp.float32), ((rows,), jnp.int32)]]
    step = jax.jit(jax.grad(lambda x, h, t, w: cross_entropy(x, h, t, w), argnums=(0, 1)))
    memory = step.lower(*shapes, jax.ShapeDtypeStruct((rows,), jnp.float32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * vocabulary * 4 / 2
