"""Cross-entropy of a linear head without ever holding [B, T, V] logits.

Rows go through the head in chunks; with a gradient wanted, each chunk's is computed in the same pass as its loss, while
the logits are at hand, so that the backward pass only scales what the forward pass left.
"""

import functools

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.ops.matmul import precision_of, project

CHUNK_ROWS = 512  # rows whose logits exist at once


def cross_entropy_reference(
    x: Float[Array, "M D"], head: Float[Array, "V D"], targets: Int[Array, "M"], weights: Float[Array, "M"]
) -> Float[Array, ""]:
    """Sum over rows of weight * -log softmax(x headᵀ)[target], all logits at once: the slow reference."""
    log_probabilities = jax.nn.log_softmax(project(x, head).astype(jnp.float32), axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0])


def cross_entropy(
    x: Float[Array, "M D"], head: Float[Array, "V D"], targets: Int[Array, "M"], weights: Float[Array, "M"], chunk: int = CHUNK_ROWS
) -> Float[Array, ""]:
    """Sum over rows of weight * -log softmax(x headᵀ)[target], in float32; no gradient flows to `weights`."""
    return jnp.asarray(_cross_entropy(x, head, targets, weights, chunk))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(x: Array, head: Array, targets: Array, weights: Array, chunk: int) -> Array:
    return jnp.sum(weights * token_losses(x, head, targets, chunk))


def token_losses(x: Float[Array, "M D"], head: Float[Array, "V D"], targets: Int[Array, "M"], chunk: int = CHUNK_ROWS) -> Float[Array, "M"]:
    """-log softmax(x headᵀ)[target] of every row, in nats, float32."""

    def step(_, inputs):
        rows, row_targets = inputs
        return None, _chunk_loss(_logits(rows, head), row_targets)[0]

    _, losses = lax.scan(step, None, (_chunked(x, chunk), _chunked(targets, chunk)))
    return losses.reshape(-1)[: x.shape[0]]


def _logits(rows: Array, head: Array) -> Array:
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(rows, head, dimensions, precision=precision_of(rows.dtype), preferred_element_type=jnp.float32)


def _chunk_loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    """(loss, log-sum-exp) of each row."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return normaliser - of_target, normaliser


def _chunked(rows: Array, chunk: int) -> Array:
    """[M, ...] -> [chunks, rows of a chunk, ...], zero-padded at the end; chunks of nearly equal size, at most `chunk` rows."""
    count = -(-rows.shape[0] // chunk)
    size = -(-rows.shape[0] // count)
    padding = [(0, count * size - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(count, size, *rows.shape[1:])


def _forward(x, head, targets, weights, chunk):
    def step(carry, inputs):
        total, head_gradient = carry
        rows, row_targets, row_weights = inputs
        logits = _logits(rows, head)
        losses, normaliser = _chunk_loss(logits, row_targets)
        is_target = row_targets[:, None] == lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        gradient = (jnp.exp(logits - normaliser[:, None]) - is_target) * row_weights[:, None]
        gradient = gradient.astype(x.dtype)
        precision = precision_of(x.dtype)
        row_gradient = lax.dot_general(gradient, head, (((1,), (0,)), ((), ())), precision=precision)
        share = lax.dot_general(gradient, rows, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        return (total + jnp.sum(row_weights * losses), head_gradient + share), row_gradient

    start = (jnp.float32(0.0), jnp.zeros(head.shape, jnp.float32))
    chunks = (_chunked(x, chunk), _chunked(targets, chunk), _chunked(weights, chunk))
    (total, head_gradient), row_gradients = lax.scan(step, start, chunks)
    x_gradient = row_gradients.reshape(-1, x.shape[1])[: x.shape[0]]
    return total, (x_gradient, head_gradient.astype(head.dtype))


def _backward(chunk, saved, scale):
    x_gradient, head_gradient = saved
    return (x_gradient * scale).astype(x_gradient.dtype), (head_gradient * scale).astype(head_gradient.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
