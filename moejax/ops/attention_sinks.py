"""Attention of many queries to sinks and a window: two rotations of every query, one softmax."""

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.ops.matmul import precision_of
from moejax.ops.visibility import Indices, Visibility, visible_pairs

BLOCK = 128  # queries whose scores exist at once


def attend_with_sinks(
    sink_query: Float[Array, "B T N H"],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    sink_index: Int[Array, "B T"],
    visibility: Visibility,
    sinks: int,
    sink_window: int | None,
) -> Float[Array, "B T N H"]:
    """Softmax attention where the first `sinks` keys meet `sink_query`, at `sink_index` and within `sink_window`, and all others `query`.

    As `attend_reference` otherwise: scale 1/sqrt(H), softmax in float32, query head j reads key head j // (N/K).
    """
    batch, time, num_heads, width = query.shape
    num_kv_heads = key.shape[2]
    precision = precision_of(query.dtype)
    sink_keys, other_keys = (Indices(index) for index in jnp.split(visibility.keys.index, [sinks], axis=1))

    def one_block(inputs: tuple[Array, ...]) -> Array:
        sink_query, query, sink_index, index = inputs

        def score(query: Array, key: Array, seen: Array) -> Array:
            query = query.reshape(batch, -1, num_kv_heads, num_heads // num_kv_heads, width)
            scores = jnp.einsum("btkgh,bskh->bkgts", query, key, precision=precision, preferred_element_type=jnp.float32)
            return jnp.where(seen[:, None, None], scores * width**-0.5, jnp.finfo(jnp.float32).min)

        to_sinks = score(sink_query, key[:, :sinks], visible_pairs(Indices(sink_index), sink_keys, sink_window))
        to_others = score(query, key[:, sinks:], visible_pairs(Indices(index), other_keys, visibility.window))
        weights = jax.nn.softmax(jnp.concatenate([to_sinks, to_others], axis=-1), axis=-1).astype(value.dtype)
        return jnp.einsum("bkgts,bskh->btkgh", weights, value, precision=precision).reshape(batch, -1, num_heads, width)

    parts = (sink_query, query, sink_index, visibility.queries.index)
    if time <= BLOCK:
        return one_block(parts)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -time % BLOCK)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, -1, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    out = lax.map(one_block, tuple(cut(part) for part in parts))
    return out.swapaxes(0, 1).reshape(batch, -1, num_heads, width)[:, :time]
