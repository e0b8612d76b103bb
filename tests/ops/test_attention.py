"""Attention against a loop over queries in float64, and the properties of rotary positions."""

import re

import jax
import jax.export
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops import attention
from moejax.ops.attention import FEW_QUERIES, attend, attend_reference, rotary_angles, rotate
from moejax.ops.rope import rotary_frequencies
from moejax.ops.visibility import Indices, describe_visibility, visible_keys


def attend_by_loops(query, key, value, visible):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    group = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = np.flatnonzero(visible[b, t])
        if not len(seen):
            out[b, t, n] = value[b, :, n // group].mean(axis=0)
            continue
        scores = key[b, seen, n // group] @ query[b, t, n] / np.sqrt(query.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, seen, n // group]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("function", [attend, attend_reference])
def test_attention_is_the_softmax_over_the_visible_keys(heads, kv_heads, window, function):
    keys = jax.random.split(jax.random.key(0), 3)
    time = FEW_QUERIES + 5
    query = jax.random.normal(keys[0], (2, time, heads, 8))
    key = jax.random.normal(keys[1], (2, time, kv_heads, 8))
    value = jax.random.normal(keys[2], (2, time, kv_heads, 8))
    index = jnp.broadcast_to(jnp.arange(time), (2, time))
    real = index < jnp.array([[time], [3]])
    visibility = describe_visibility(Indices(index), Indices(index, real=real), window)
    expected = attend_by_loops(query, key, value, np.asarray(visible_keys(visibility)))
    np.testing.assert_allclose(jax.jit(function)(query, key, value, visibility), expected, atol=1e-5)


def test_few_queries_against_many_keys():
    """As in decoding: two queries of each row, at different places, against a cache."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 2, 4, 8))
    key, value = (jax.random.normal(k, (2, 50, 2, 8)) for k in keys[1:])
    index = jnp.array([[7, 8], [48, 49]])
    visibility = describe_visibility(Indices(index), Indices(jnp.broadcast_to(jnp.arange(50), (2, 50))))
    expected = attend_by_loops(query, key, value, np.asarray(visible_keys(visibility)))
    np.testing.assert_allclose(attend(query, key, value, visibility), expected, atol=1e-5)


def test_rotation_depends_on_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(query_position, key_position):
        def at(x, position):
            return rotate(x, rotary_angles(jnp.array([[position]]), rotary_frequencies(16, 10_000.0)))

        return float(jnp.sum(at(query, query_position) * at(key, key_position)))

    assert score(5, 2) == pytest.approx(score(103, 100), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_the_attention_factor_stretches_queries_and_keys():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 8))
    frequencies = rotary_frequencies(8, 100.0, kind="yarn", factor=4.0, original_length=64, attention_factor=1.5)
    out = rotate(x, rotary_angles(jnp.array([[3]]), frequencies))
    assert float(jnp.linalg.norm(out)) == pytest.approx(1.5 * float(jnp.linalg.norm(x)), rel=1e-6)


def test_rotation_pairs_the_halves():
    """Position 1, first pair (0, H/2), angle exactly 1: (1, 0) becomes (cos 1, sin 1)."""
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    out = rotate(x, rotary_angles(jnp.array([[1]]), rotary_frequencies(4, 10_000.0)))[0, 0, 0]
    np.testing.assert_allclose(out, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


@pytest.mark.parametrize(("many", "has_scores"), [(37 * 4 * 53 * 2 - 1, False), (37 * 4 * 53 * 2, True)])
def test_too_many_scores_do_not_exist_at_once_where_no_kernel_serves(monkeypatch, many, has_scores):
    """Programs for a TPU, of a chunk of a prompt read into a cache."""
    monkeypatch.setattr(attention, "MANY_SCORES", many)
    parts = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(parts[0], (2, 37, 4, 8))
    key, value = (jax.random.normal(part, (2, 53, 2, 8)) for part in parts[1:])
    queries, keys = (jnp.broadcast_to(jnp.arange(start, end), (2, end - start)) for start, end in ((16, 53), (0, 53)))
    visibility = describe_visibility(Indices(queries), Indices(keys))
    program = jax.export.export(jax.jit(lambda *a: attend(*a)), platforms=["tpu"])(query, key, value, visibility).mlir_module()
    assert bool(re.search("tensor<[0-9x]*37x53xf32>", program)) == has_scores
