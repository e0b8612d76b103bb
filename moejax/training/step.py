"""One optimiser step, jitted: gradients of the objective, the update, and what it measured."""

import functools
import math
from typing import Any

import jax
import optax
from jax import Array
from jax import numpy as jnp

from moejax.model.transformer import Transformer
from moejax.training.objectives import pretrain
from moejax.training.state import TrainState


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    model: Transformer, optimizer: optax.GradientTransformation, state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step on one Batch; the state is donated. Metrics are float32 scalars."""

    def objective(params: Any):
        losses, outputs = pretrain(model, {"params": params}, batch)
        return losses.total, (losses, outputs)

    gradients, (losses, outputs) = jax.grad(objective, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    metrics = {
        "loss": losses.ce,
        "router_aux_loss": losses.aux,
        "router_z_loss": losses.z,
        "grad_norm": optax.tree.norm(gradients),
        "expert_load_entropy": load_entropy(outputs.router_statistics),
        "dropped_tokens": outputs.dropped.astype(jnp.float32),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), metrics


def load_entropy(statistics: Any) -> Array:
    """Entropy of the experts' shares of the tokens over its maximum, log E; mean over layers. 1 is perfect balance."""
    if statistics is None or statistics.load.shape[-1] == 1:
        return jnp.float32(1.0)
    share = statistics.load / jnp.maximum(jnp.sum(statistics.load, axis=-1, keepdims=True), 1e-9)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-9)), axis=-1)
    return jnp.mean(entropy) / math.log(statistics.load.shape[-1])
