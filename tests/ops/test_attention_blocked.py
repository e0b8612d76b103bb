"""Attention in blocks against all scores at once: values and gradients, whatever the blocks, and what it does not compute."""

import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops import attention_blocked
from moejax.ops.attention import attend_reference
from moejax.ops.attention_blocked import attend_blocked
from moejax.ops.visibility import Indices, describe_visibility


def make_inputs(time, keys=None, dtype=jnp.float32):
    parts = jax.random.split(jax.random.key(time), 4)
    query, gradient = (jax.random.normal(part, (2, time, 4, 8), dtype) for part in parts[:2])
    key, value = (jax.random.normal(part, (2, keys or time, 2, 8), dtype) for part in parts[2:])
    return query, key, value, gradient


def places(time, start=0):
    return jnp.broadcast_to(jnp.arange(start, start + time), (2, time))


SEGMENTS = jnp.array([[1] * 9 + [2] * 20 + [3] * 8, [1] * 30 + [0] * 7])
CASES = {
    "causal": describe_visibility(Indices(places(37)), Indices(places(37))),
    "window": describe_visibility(Indices(places(37)), Indices(places(37)), window=5),
    "window wider than a block": describe_visibility(Indices(places(37)), Indices(places(37)), window=21),
    "packed": describe_visibility(Indices(places(37), SEGMENTS), Indices(places(37), SEGMENTS)),
    "padded": describe_visibility(Indices(places(37)), Indices(places(37), real=places(37) < jnp.array([[37], [20]]))),
}


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("case", CASES)
def test_blocked_is_the_reference(case, block):
    *arrays, gradient = make_inputs(37)
    expected, expected_back = jax.vjp(lambda *a: attend_reference(*a, CASES[case]), *arrays)
    out, back = jax.vjp(lambda *a: attend_blocked(*a, CASES[case], block), *arrays)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for got, wanted in zip(back(gradient), expected_back(gradient), strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-6)


def test_queries_that_are_a_later_part_of_the_keys():
    """Where the time is divided over devices, each has its own queries and all keys."""
    query, key, value, _ = make_inputs(12, keys=37)
    visibility = describe_visibility(Indices(places(12, 20)), Indices(places(37)))
    np.testing.assert_allclose(attend_blocked(query, key, value, visibility, 8), attend_reference(query, key, value, visibility), atol=2e-6)


def test_queries_that_see_nothing_give_zeros_and_no_gradient():
    *arrays, gradient = make_inputs(37)
    real = places(37) < jnp.array([[37], [3]])
    visibility = describe_visibility(Indices(places(37)), Indices(places(37), real=real), window=4)
    out, back = jax.vjp(lambda *a: attend_blocked(*a, visibility, 8), *arrays)
    assert not np.any(out[1, 6:]) and np.all(np.any(np.asarray(out[0]), axis=(1, 2)))
    gradients = back(gradient.at[1, :6].set(0.0))
    assert not any(np.any(part[1]) for part in gradients)
    assert all(np.all(np.isfinite(part)) for part in gradients)


def test_bfloat16_keeps_its_type_and_its_precision():
    *arrays, _ = make_inputs(37, dtype=jnp.bfloat16)
    out = attend_blocked(*arrays, CASES["causal"], 16)
    assert out.dtype == jnp.bfloat16
    exact = attend_reference(*(x.astype(jnp.float32) for x in arrays), CASES["causal"])
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_blocks_that_do_not_meet_are_not_computed(monkeypatch):
    """Keys after every query, or before its window, may hold anything, NaN too: their blocks are skipped."""
    query, key, value, _ = make_inputs(64)
    visibility = describe_visibility(Indices(places(64)), Indices(places(64)), window=8)
    clean = attend_blocked(query, key, value, visibility, 8)
    out = attend_blocked(query.at[:, 16:24].set(0.0), key.at[:, 32:].set(jnp.nan).at[:, :8].set(jnp.nan), value, visibility, 8)
    np.testing.assert_array_equal(out[:, 24:32], clean[:, 24:32])


def test_no_array_is_as_large_as_all_scores():
    query, key, value, gradient = make_inputs(512)
    visibility = describe_visibility(Indices(places(512)), Indices(places(512)))
    lowered = jax.jit(lambda *a: jax.vjp(lambda *b: attend_blocked(*b, visibility), *a)[1](gradient)).lower(query, key, value)
    memory = lowered.compile().memory_analysis()
    scores = 2 * 4 * 512 * 512 * 4
    assert memory.temp_size_in_bytes < 1.5 * scores  # three such arrays are what the reference keeps
    assert attention_blocked.BLOCKS[0] < 512


@pytest.mark.parametrize("rematerialised", [False, True])
def test_layers_that_share_a_mask_do_not_keep_all_of_it(rematerialised):
    """A scan takes what is the same for all layers out of the loop: the masks of all pairs of blocks were such a thing."""
    query, key, value, _ = make_inputs(80)

    def loss(query, index):
        def layer(x, _):
            return attend_blocked(x, key, value, describe_visibility(Indices(index), Indices(index)), 16), None

        body = jax.checkpoint(layer) if rematerialised else layer
        return jnp.sum(jax.lax.scan(body, query, None, length=3)[0] ** 2)

    program = jax.jit(jax.grad(loss)).lower(query, places(80)).compile().as_text()
    assert "f32[5," in program  # stacked by blocks of queries
    assert re.findall(r"(?:pred|f32)\[5,5,[0-9,]*16,16\]", program) == []
