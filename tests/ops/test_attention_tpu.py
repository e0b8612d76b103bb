"""Attention on TPUs, its kernel's steps interpreted here, against the plain attention: values and gradients."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.attention import attend_reference
from moejax.ops.attention_tpu import attend_tpu, why_not
from moejax.ops.visibility import Indices, Visibility, visible_keys

TIME = 384  # three blocks


def make(width=64, heads=4, kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, TIME, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape).astype(jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


SEGMENTS = np.repeat(np.array([[1, 2, 2, 3], [7, 1, 7, 0]], np.int32), TIME // 4, axis=1)  # one comes back, as no packed row would
REAL = np.arange(TIME)[None, :] < np.array([[TIME], [100]])


@pytest.mark.parametrize(
    ("window", "real", "segments", "width"),
    [pytest.param(70, None, SEGMENTS, 64, marks=pytest.mark.slow), pytest.param(None, REAL, None, 128, marks=pytest.mark.slow)],
)
def test_values_and_gradients_are_the_references(window, real, segments, width):
    query, key, value, cotangent = make(width)
    index = jnp.broadcast_to(jnp.arange(TIME, dtype=jnp.int32), (2, TIME))
    real, segments = (None if part is None else jnp.asarray(part) for part in (real, segments))
    visibility = Visibility(Indices(index, segments), Indices(index, segments, real), window=window)
    visible = visible_keys(visibility)
    sees = visible.any(axis=2)[:, :, None, None]

    def run(function):
        value_, pull = jax.vjp(lambda *given: jnp.where(sees, function(*given), jnp.zeros((), jnp.bfloat16)), query, key, value)
        return value_, *pull(cotangent)

    settings = {"window": window, "key_is_real": real, "query_segments": segments, "key_segments": segments, "interpret": True}
    ours = jax.jit(lambda: run(lambda *given: attend_tpu(*given, **settings)))()
    wide = [part.astype(jnp.float32) for part in (query, key, value)]
    value_, pull = jax.vjp(lambda *given: jnp.where(sees, attend_reference(*given, visibility), 0.0), *wide)
    for found, expected in zip(ours, (value_, *pull(cotangent.astype(jnp.float32))), strict=True):
        assert found.dtype == jnp.bfloat16
        error = np.abs(np.asarray(found, np.float32) - np.asarray(expected))
        assert error.max() < 0.03 * max(1.0, float(np.abs(expected).max()))


def test_what_it_does_not_serve_has_a_reason():
    query = jax.ShapeDtypeStruct((2, 256, 8, 64), jnp.bfloat16)
    assert why_not(query, True) is None
    assert "whole rows" in str(why_not(query, False))
    assert "float32" in str(why_not(query.update(dtype=jnp.float32), True))
    assert "rows of 200" in str(why_not(query.update(shape=(2, 200, 8, 64)), True))
