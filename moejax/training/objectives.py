"""Objectives: (model, variables, batch) -> losses. The head is applied in chunks; [B, T, V] logits never exist."""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
from jax import Array
from jax import numpy as jnp

from moejax.model.transformer import Outputs, Transformer, head_weight
from moejax.training.head_loss import head_cross_entropy, head_token_losses


@flax.struct.dataclass
class Losses:
    """Float32 scalars. ce: mean cross-entropy in nats over counted targets. aux, z: the router's, unscaled.
    total = ce + router_aux_loss_coefficient * aux + router_z_loss_coefficient * z."""

    ce: Array
    aux: Array
    z: Array
    total: Array


class Whole(NamedTuple):
    """The batch that a batch is a part of: float32 sum of all its weights, and the number of its parts."""

    weight: Array
    parts: int


def weighted_losses(
    model: Transformer, variables: Any, outputs: Outputs, targets: Array, weights: Array, whole: Whole | None = None
) -> Losses:
    """Losses of a finished forward pass; targets int32 [B, T], weights float32 [B, T]. No counted target gives ce 0.

    With `whole`, what this part contributes: the parts' losses add up to the whole's. That is exact for the cross-entropy, however
    unevenly the weights lie; the router's losses become the mean over the parts, each part's balance taken by itself.
    """
    config = model.config
    head = head_weight(variables["params"]).astype(outputs.features.dtype)
    share = weights / jnp.maximum(jnp.sum(weights) if whole is None else whole.weight, 1e-8)
    ce = head_cross_entropy(model.mesh, outputs.features, head, jnp.asarray(targets), share)
    aux, z = outputs.aux_loss, outputs.z_loss
    if whole is not None:
        aux, z = aux / whole.parts, z / whole.parts
    return Losses(ce, aux, z, ce + config.router_aux_loss_coefficient * aux + config.router_z_loss_coefficient * z)


def pretrain(model: Transformer, variables: Any, batch: Any, whole: Whole | None = None) -> tuple[Losses, Outputs]:
    """Next-token prediction on packed rows (moejax.data.rows.Batch): documents of a row do not see each other.

    `whole` where the batch is one part of a larger one, as in `weighted_losses`.
    """
    outputs = model.apply(variables, batch.tokens, positions=batch.positions, segments=batch.segments, return_logits=False)
    return weighted_losses(model, variables, outputs, batch.targets, batch.weights, whole), outputs


@functools.partial(jax.jit, static_argnums=0)
def loss(model: Transformer, variables: Any, tokens: Array, labels: Array, mask: Any = None) -> Losses:
    """Losses of `tokens` int32 [B, T] against `labels` [B, T], as the Hugging Face models define them.

    Labels are the tokens themselves (shifted inside: position t predicts labels[t+1]); labels below 0 do not count. `mask`
    [B, T] is 1 where a token is real. Differentiable with respect to `variables`.
    """
    outputs = model.apply(variables, tokens, mask=mask, return_logits=False)
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return weighted_losses(model, variables, outputs, jnp.maximum(targets, 0), (targets >= 0).astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def negative_log_likelihoods(model: Transformer, variables: Any, batch: Any) -> Array:
    """-log p of every target in nats, float32 [B, T], times its weight: the sums that evaluation adds up."""
    outputs = model.apply(variables, batch.tokens, positions=batch.positions, segments=batch.segments, return_logits=False)
    head = head_weight(variables["params"]).astype(outputs.features.dtype)
    return head_token_losses(model.mesh, outputs.features, head, jnp.asarray(batch.targets)) * batch.weights
