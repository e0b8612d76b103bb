"""Every grouped matmul against the reference, with groups that are empty, huge, tiny and off the block sizes."""

import jax
import numpy as np
import pytest
from jax import export
from jax import numpy as jnp

from moejax.ops import grouped

SIZES = {
    "even": [8, 8, 8, 8],
    "off every block": [1, 31, 33, 67],
    "empty ones": [0, 70, 0, 5],
    "all in the last": [0, 0, 0, 40],
    "all in the first": [40, 0, 0, 0],
    "whole blocks and tails": [300, 256, 512, 91],
    "two rows": [1, 0, 1, 0],
    "no rows": [0, 0, 0, 0],
}


def make(sizes, inside=12, outside=10, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (sum(sizes), inside), dtype)
    weights = jax.random.normal(keys[1], (len(sizes), outside, inside), dtype)
    cotangent = jax.random.normal(keys[2], (sum(sizes), outside), dtype)
    return x, weights, jnp.array(sizes, jnp.int32), cotangent


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("backend", ["grouped_matmul_blocked", "grouped_matmul_ragged", "grouped_matmul"])
def test_values_and_gradients_equal_the_reference(name, backend):
    if backend == "grouped_matmul_ragged" and name == "no rows":
        pytest.skip("lax.ragged_dot takes no empty operand")
    x, weights, sizes, cotangent = make(SIZES[name])

    def run(function):
        value, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, weights)
        return value, *pull(cotangent)

    expected = jax.jit(lambda: run(grouped.grouped_matmul_reference))()
    for ours, theirs in zip(jax.jit(lambda: run(getattr(grouped, backend)))(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, float(jnp.max(jnp.abs(theirs), initial=0.0))))


@pytest.mark.parametrize("name", ["off every block", "empty ones", "two rows", "whole blocks and tails"])
def test_spare_rows_change_nothing(name):
    """Rows behind the last group, whatever they hold, touch no group's result and no gradient of a weight."""
    x, weights, sizes, cotangent = make(SIZES[name])

    def run(x, cotangent, spare):
        value, pull = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, sizes, spare), x, weights)
        return value, *pull(cotangent)

    value, x_gradient, weight_gradient = jax.jit(run, static_argnums=2)(x, cotangent, 0)
    junk = jnp.full((grouped.SPARE_ROWS, x.shape[1]), 7.0)
    spare = jax.jit(run, static_argnums=2)(jnp.concatenate([x, junk]), jnp.pad(cotangent, ((0, len(junk)), (0, 0))), len(junk))
    np.testing.assert_allclose(spare[0][: len(x)], value, atol=1e-5)
    np.testing.assert_allclose(spare[1][: len(x)], x_gradient, atol=1e-5)
    np.testing.assert_allclose(spare[2], weight_gradient, atol=1e-4)


def test_sizes_need_not_be_known_when_compiling():
    """One compiled program serves every split of the same number of rows."""
    x, weights, _, _ = make([64, 64, 64, 64])
    compiled = jax.jit(grouped.grouped_matmul)
    for split in ([256, 0, 0, 0], [1, 2, 3, 250], [0, 128, 0, 128]):
        sizes = jnp.array(split, jnp.int32)
        np.testing.assert_allclose(compiled(x, weights, sizes), grouped.grouped_matmul_reference(x, weights, sizes), atol=1e-4)
    assert compiled._cache_size() == 1


def test_bfloat16_stays_bfloat16():
    x, weights, sizes, _ = make([5, 40, 0, 3], dtype=jnp.bfloat16)
    out = grouped.grouped_matmul(x, weights, sizes)
    assert out.dtype == jnp.bfloat16
    expected = grouped.grouped_matmul_reference(x.astype(jnp.float32), weights.astype(jnp.float32), sizes)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.1)


def test_lowers_for_tpus_to_a_ragged_dot():
    """Lowered, not run: nothing here has the device. There one ragged dot is one operation."""
    x, weights, sizes, _ = make([8, 8, 8, 8])
    lowered = export.export(jax.jit(grouped.grouped_matmul), platforms=["tpu"])(x, weights, sizes).mlir_module()
    assert "ragged_dot" in lowered
    assert "while" not in lowered
