"""Attention block by block, forward and backward: no array as large as T x S, and no work on pairs of blocks that do not see each other.

The method of FlashAttention (Dao et al. 2022, and 2023 for the backward pass): a running maximum and sum of each query while its blocks of
keys go by, and in the backward pass the probabilities computed again from the log-sum-exp. Memory grows with T alone.
"""

import functools
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float

from moejax.ops.matmul import precision_of
from moejax.ops.visibility import FAR, Indices, Visibility, visible_pairs

BLOCKS = (128, 256)  # queries, and keys, of a block: the larger for rows of LONG tokens and more, where less of it is beyond the diagonal
LONG = 1024
TILE = 16  # blocks are multiples of that


def attend_blocked(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    visibility: Visibility,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """As `attend_reference`, but for queries that see no key: those give zeros."""
    batch, time, num_heads, width = query.shape
    num_kv_heads = key.shape[2]
    block = block or BLOCKS[time >= LONG]
    block, key_block = (min(block, -(-length // TILE) * TILE) for length in (time, key.shape[1]))  # a short prompt is no whole block
    heads = _cut_heads(query, num_kv_heads, block), *(_cut_heads(x, num_kv_heads, key_block) for x in (key, value))
    queries, keys = _cut_indices(visibility.queries, block, -1), _cut_indices(visibility.keys, key_block, FAR)
    out = jnp.asarray(_attend(*heads, queries, keys, visibility.window))
    out = out.reshape(out.shape[0], batch, num_kv_heads, num_heads // num_kv_heads, block, width)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, num_heads, width)[:, :time]


def _pad_time(x: Array, block: int, value: Any = 0) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2), constant_values=value)


def _cut_heads(x: Array, num_kv_heads: int, block: int) -> Array:
    """[B, T, N, H] -> [blocks, B * K, N/K * block, H]: the heads that share a key head are further rows of one matmul."""
    x = _pad_time(x, block)
    batch, time, num_heads, width = x.shape
    x = x.reshape(batch, time // block, block, num_kv_heads, num_heads // num_kv_heads, width)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(time // block, batch * num_kv_heads, -1, width)


def _cut_indices(indices: Indices, block: int, far: int) -> Indices:
    """[B, T] -> [blocks, B, block]; what is added at the end sees nothing (far < 0), or is seen by nobody."""

    def cut(x: Array | None, value: Any) -> Any:
        return None if x is None else _pad_time(x, block, value).reshape(x.shape[0], -1, block).swapaxes(0, 1)

    return Indices(cut(indices.index, far), cut(indices.segments, 0), cut(indices.real, False))


def _meet(queries: Indices, keys: Indices, window: int | None) -> Array:
    """Whether any query of the one block can see any key of the other, by their indices."""
    meet = jnp.max(queries.index) >= jnp.min(keys.index)
    if window is not None:
        first = jnp.min(jnp.where(queries.index < 0, FAR, queries.index))
        last = jnp.max(jnp.where(keys.index == FAR, -FAR, keys.index))
        meet &= first - last < window
    return meet


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Contracts one axis of each for every key head [B*K, ., .], in float32."""
    dimensions = (((left_axis,), (right_axis,)), ((0,), (0,)))
    return lax.dot_general(left, right, dimensions, precision=precision_of(left.dtype), preferred_element_type=jnp.float32)


def _scores(query: Array, key: Array, queries: Indices, keys: Indices, window: int | None) -> Array:
    """[B*K, rows, block] float32, -inf where the key is not seen."""
    scores = _dot(query, key, 2, 2) * query.shape[-1] ** -0.5
    seen = visible_pairs(queries, keys, window)
    batch, block = queries.index.shape
    split = scores.reshape(batch, -1, block, scores.shape[-1])
    return jnp.where(seen[:, None], split, -jnp.inf).reshape(scores.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query: Array, key: Array, value: Array, queries: Indices, keys: Indices, window: int | None) -> Array:
    return _forward(query, key, value, queries, keys, window)[0]


@functools.partial(jax.jit, static_argnums=5)
def _forward(query: Array, key: Array, value: Array, queries: Indices, keys: Indices, window: int | None):
    # One with the queries: a scan over layers would see that masks are the same for all, make every block of them first, and keep them.
    query, queries, keys = lax.optimization_barrier((query, queries, keys))

    def over_keys(query: Array, queries: Indices):
        def add_block(carry, inputs):
            key, value, keys = inputs

            def add(carry):
                highest, total, mixed = carry
                scores = _scores(query, key, queries, keys, window)
                new = jnp.maximum(highest, jnp.max(scores, axis=-1))
                base = jnp.where(jnp.isfinite(new), new, 0.0)
                weights = jnp.exp(scores - base[..., None])
                shrink = jnp.exp(highest - base)
                mixed = mixed * shrink[..., None] + _dot(weights.astype(value.dtype), value, 2, 1)
                return new, total * shrink + jnp.sum(weights, axis=-1), mixed

            return lax.cond(_meet(queries, keys, window), add, lambda carry: carry, carry), None

        shape = query.shape[:2]
        start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, value.shape[-1]))
        (highest, total, mixed), _ = lax.scan(add_block, start, (key, value, keys))
        base = jnp.where(jnp.isfinite(highest), highest, 0.0)
        total = jnp.where(total == 0.0, 1.0, total)
        return (mixed / total[..., None]).astype(query.dtype), base + jnp.log(total)

    def one_block(_, inputs):
        return None, over_keys(*inputs)

    _, (out, normaliser) = lax.scan(one_block, None, (query, queries))
    return out, (query, key, value, queries, keys, out, normaliser)


@functools.partial(jax.jit, static_argnums=0)
def _backward(window: int | None, saved, gradient: Array):
    query, key, value, queries, keys, out, normaliser = saved
    query, queries, keys = lax.optimization_barrier((query, queries, keys))  # as in `_forward`
    scale = query.shape[-1] ** -0.5

    def one_block(totals, inputs):
        query, queries, out, normaliser, gradient = inputs
        drift = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

        def add_block(query_gradient, inputs):
            key, value, keys, key_total, value_total = inputs

            def add(carry):
                query_gradient, key_total, value_total = carry
                weights = jnp.exp(_scores(query, key, queries, keys, window) - normaliser[..., None])
                value_total += _dot(weights.astype(gradient.dtype), gradient, 1, 1)
                slope = weights * (_dot(gradient, value, 2, 2) - drift[..., None]) * scale
                slope = slope.astype(query.dtype)
                return query_gradient + _dot(slope, key, 2, 1), key_total + _dot(slope, query, 1, 1), value_total

            carry = (query_gradient, key_total, value_total)
            query_gradient, *totals = lax.cond(_meet(queries, keys, window), add, lambda carry: carry, carry)
            return query_gradient, tuple(totals)

        start = jnp.zeros(query.shape, jnp.float32)
        query_gradient, totals = lax.scan(add_block, start, (key, value, keys, *totals))
        return totals, query_gradient.astype(query.dtype)

    totals = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    totals, query_gradient = lax.scan(one_block, totals, (query, queries, out, normaliser, gradient))
    return query_gradient, totals[0].astype(key.dtype), totals[1].astype(value.dtype), None, None


_attend.defvjp(_forward, _backward)
