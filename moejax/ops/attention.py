"""Attention: rotary position embeddings, the mask of who sees whom, and the attention itself."""

from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.ops.matmul import precision_of


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, float32 [B, T, H/2]."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotary_angles(positions: Int[Array, "B T"], head_width: int, theta: float) -> Rotation:
    """The rotation of each position: angle_i = position * theta^(-2i/H) for i in 0..H/2-1 (RoFormer, Su et al. 2021)."""
    exponents = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    frequencies = 1.0 / jnp.power(jnp.float32(theta), exponents)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T heads H"], rotation: Rotation) -> Float[Array, "B T heads H"]:
    """Rotates the pairs (i, i + H/2) of every head, as Hugging Face's weights expect; in float32, result in the type of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation.cos[:, :, None, :], rotation.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def visible_keys(
    query_index: Int[Array, "B T"],
    key_index: Int[Array, "B S"],
    *,
    window: int | None = None,
    key_is_real: Bool[Array, "B S"] | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: those at or before it, within the window, of its own segment, and not padding.

    Indices are places in the row (or the cache), not rotary positions, which restart in every packed document.
    `window` counts the keys seen, the query's own included. A row of padding may see nothing.
    """
    distance = query_index[:, :, None] - key_index[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if key_is_real is not None:
        visible &= key_is_real[:, None, :]
    if query_segments is not None and key_segments is not None:
        visible &= query_segments[:, :, None] == key_segments[:, None, :]
    return visible


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    visible: Bool[Array, "B T S"],
    num_keys: int | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention at scale 1/sqrt(H); query head j reads key/value head j // (N/K). Softmax in float32.

    A query that sees no key at all (padding, beyond the window of the last real token) gives the mean of all values, never
    NaN: so does the reference's masked softmax, and Arctic's load-balance loss counts those rows too. Keys from `num_keys` on, which
    are there only to fill up a mesh, are not in that mean.
    """
    batch, time, num_heads, width = query.shape
    num_kv_heads = key.shape[2]
    group = num_heads // num_kv_heads
    precision = precision_of(query.dtype)

    def heads_first(x: Array) -> Array:
        return x.transpose(0, 2, 1, 3).reshape(batch * num_kv_heads, -1, width)

    # The heads that share a key head are further rows of one matmul per key head: keys are never repeated.
    rows = query.reshape(batch, time, num_kv_heads, group, width).transpose(0, 2, 3, 1, 4).reshape(batch * num_kv_heads, -1, width)
    contract_width = (((2,), (2,)), ((0,), (0,)))
    scores = lax.dot_general(rows, heads_first(key), contract_width, precision=precision, preferred_element_type=jnp.float32)
    scores = (scores * width**-0.5).reshape(batch, num_kv_heads, group, time, -1)
    scores = jnp.where(visible[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    if num_keys is not None:
        scores = jnp.where((jnp.arange(scores.shape[-1]) < num_keys)[None, None, None, None, :], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(rows.shape[0], rows.shape[1], -1)
    out = lax.dot_general(probabilities, heads_first(value), (((2,), (1,)), ((0,), (0,))), precision=precision)
    return out.reshape(batch, num_kv_heads, group, time, width).transpose(0, 3, 1, 2, 4).reshape(batch, time, num_heads, width)
