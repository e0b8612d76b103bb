"""Attention: rotary position embeddings, and the attention itself.

`attend` picks by sizes and by the platform it is compiled for; `attend_reference` is the slow truth that the others are tested against.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.ops import attention_cuda, attention_tpu
from moejax.ops.attention_blocked import attend_blocked
from moejax.ops.matmul import precision_of
from moejax.ops.platforms import say_once
from moejax.ops.rope import RotaryFrequencies
from moejax.ops.visibility import Visibility, visible_keys

# Fewer queries than this (decoding) go through the reference: there is nothing to divide into blocks.
FEW_QUERIES = 32
# Where no kernel serves, more scores than this (1 GiB in float32) do not exist at once, as of a long prompt read into a cache.
MANY_SCORES = 2**28


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, float32 [B, T, H/2]."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotary_angles(positions: Int[Array, "B T"], frequencies: RotaryFrequencies) -> Rotation:
    """The rotation of each position: angle_i = position * radians_i, cosine and sine times the attention factor."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies.radians[None, None, :]
    return Rotation(jnp.cos(angles) * frequencies.attention_factor, jnp.sin(angles) * frequencies.attention_factor)


def rotate(x: Float[Array, "B T heads H"], rotation: Rotation) -> Float[Array, "B T heads H"]:
    """Rotates the pairs (i, i + H/2) of every head, as Hugging Face's weights expect; in float32, result in the type of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation.cos[:, :, None, :], rotation.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], visibility: Visibility
) -> Float[Array, "B T N H"]:
    """What `attend_reference` gives, by the way that is fast here: where there are queries enough, in blocks on CPU and by the kernels of
    `ops.attention_tpu` and `ops.attention_cuda`; else, and where a kernel does not fit, as it is, or in blocks if scores are MANY_SCORES.
    """
    if query.shape[1] < FEW_QUERIES:
        return attend_reference(query, key, value, visibility)
    ways = _kernels(query, key, visibility)
    # What one way keeps for the backward pass, the others carry as zeros until XLA finds out: all scores are computed again instead.
    plain = attend_blocked if _has_many_scores(query, key) else jax.checkpoint(attend_reference)
    out = lax.platform_dependent(query, key, value, visibility, cpu=attend_blocked, default=plain, **ways)
    if visibility.blind is None:
        return out
    mean = jnp.mean(value[:, : visibility.num_keys].astype(jnp.float32), axis=1).astype(value.dtype)
    mean = jnp.repeat(mean, query.shape[2] // key.shape[2], axis=1)
    return jnp.where(visibility.blind[:, :, None, None], mean[:, None], out)


def _has_many_scores(query: Array, key: Array) -> bool:
    return query.size // query.shape[-1] * key.shape[1] > MANY_SCORES


def _kernels(query: Array, key: Array, visibility: Visibility) -> dict[str, Callable[..., Array]]:
    """The kernels that serve this, by platform. On a device that would have one, it is said once why there is none."""
    whole = visibility.whole_rows and query.shape[1] == key.shape[1]  # fewer queries: the part of a row that a device of a mesh has
    real, segments = visibility.keys.real, visibility.keys.segments
    by_ranges = attention_cuda.needs_ranges(visibility.window, real, segments)
    reasons = {"tpu": attention_tpu.why_not(query, whole), "cuda": attention_cuda.why_not(query, whole, by_ranges)}
    here = {"tpu": "tpu", "gpu": "cuda"}.get(jax.default_backend())
    if here is not None and reasons[here] is not None:
        how = "scores in blocks" if _has_many_scores(query, key) else "all scores at once"
        say_once(f"attention of {query.shape[1]} queries: {how}, not a kernel; {reasons[here]}")
    ways = {"tpu": _attend_tpu, "cuda": _attend_cuda}
    return {name: way for name, way in ways.items() if reasons[name] is None}


def _attend_tpu(query: Array, key: Array, value: Array, visibility: Visibility) -> Array:
    queries, keys = visibility.queries, visibility.keys
    return attention_tpu.attend_tpu(
        query, key, value, window=visibility.window, key_is_real=keys.real, query_segments=queries.segments, key_segments=keys.segments
    )


def _attend_cuda(query: Array, key: Array, value: Array, visibility: Visibility) -> Array:
    keys = visibility.keys
    return attention_cuda.attend_cuda(query, key, value, window=visibility.window, key_is_real=keys.real, segments=keys.segments)


def attend_reference(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], visibility: Visibility
) -> Float[Array, "B T N H"]:
    """Softmax attention at scale 1/sqrt(H), all scores at once; query head j reads key/value head j // (N/K). Softmax in float32.

    A query that sees no key at all (padding, beyond the window of the last real token) gives the mean of all values, never
    NaN: so does the published models' masked softmax, and Arctic's load-balance loss counts those rows too. Keys from
    `visibility.num_keys` on are not in that mean.
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
    scores = jnp.where(visible_keys(visibility)[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    if visibility.num_keys is not None:
        scores = jnp.where((jnp.arange(scores.shape[-1]) < visibility.num_keys)[None, None, None, None, :], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(rows.shape[0], rows.shape[1], -1)
    out = lax.dot_general(probabilities, heads_first(value), (((2,), (1,)), ((0,), (0,))), precision=precision)
    return out.reshape(batch, num_kv_heads, group, time, width).transpose(0, 3, 1, 2, 4).reshape(batch, time, num_heads, width)
