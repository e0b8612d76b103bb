"""The weights' gradient on TPUs: its kernel's steps, run on CPU, give what plain multiplication does."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.grouped import grouped_matmul, grouped_matmul_reference
from moejax.ops.grouped_tpu import weight_gradient, why_not


@pytest.mark.parametrize("sizes", [(300, 0, 411), (0, 0, 0), (640, 0, 0)], ids=["uneven", "none", "one"])
def test_gradient_of_the_weights(sizes):
    """600 rows and more, not all of them in a group; what the others hold, even what is not finite, counts nowhere."""
    rows = 720
    x, gradient = (jax.random.normal(jax.random.key(key), (rows, 128)).astype(jnp.bfloat16) for key in (0, 1))
    group_sizes = jnp.array(sizes, jnp.int32)
    last = sum(sizes)
    weights = jnp.zeros((3, 128, 128), jnp.float32)
    wide = jnp.where(jnp.arange(rows)[:, None] < last, x.astype(jnp.float32), 0)
    product = lambda weights: jnp.sum(grouped_matmul_reference(wide, weights, group_sizes) * gradient)  # noqa: E731
    expected = jax.grad(product)(weights)
    made = weight_gradient(gradient.at[last:].set(jnp.nan), x.at[last:].set(jnp.nan), group_sizes, interpret=True)
    np.testing.assert_allclose(np.asarray(made, np.float32), expected, atol=0.3)  # sums of hundreds, rounded to 8 bits


def test_lowered_for_tpus_the_gradient_is_the_kernel():
    weights, x = jnp.zeros((2, 256, 128), jnp.bfloat16), jnp.zeros((512, 128), jnp.bfloat16)
    sizes = jnp.array([500, 12], jnp.int32)
    gradient = jax.jit(jax.grad(lambda weights: jnp.sum(grouped_matmul(x, weights, sizes).astype(jnp.float32))))
    text = gradient.trace(weights).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


def test_where_it_cannot_serve():
    assert why_not(128, 256, jnp.bfloat16) is None
    assert "float32" in str(why_not(128, 256, jnp.float32))
    assert "multiples of 128" in str(why_not(96, 256, jnp.bfloat16))
