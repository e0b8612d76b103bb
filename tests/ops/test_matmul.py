"""The matmul of the models, by weights in either order."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.matmul import InputMajor, as_output_major, project

X = jax.random.normal(jax.random.key(0), (2, 5, 12))
WEIGHT = jax.random.normal(jax.random.key(1), (7, 12))
TURNED = InputMajor(WEIGHT.T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_input_major_weight_gives_the_same(dtype):
    got = project(X.astype(dtype), TURNED.astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, project(X.astype(dtype), WEIGHT.astype(dtype)), rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5)


def test_an_input_major_weight_names_its_shape_as_any_other():
    assert TURNED.shape == WEIGHT.shape
    assert InputMajor(jnp.zeros((3, 12, 7))).shape == (3, 7, 12)


def test_a_tree_is_turned_back():
    tree = {"kernel": TURNED, "scale": jnp.ones(7)}
    back = as_output_major(tree)
    np.testing.assert_array_equal(back["kernel"], WEIGHT)
    assert back["scale"] is tree["scale"]
