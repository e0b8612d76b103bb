"""One optimiser step, jitted: gradients of the objective, part by part if asked, the update, and what it measured."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import optax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.compiler_options import options_for
from moejax.config import ModelConfig, TrainConfig, UserError
from moejax.model.transformer import Outputs, Transformer
from moejax.training.balancing import load_entropy, load_max_over_mean, move_biases
from moejax.training.objectives import Losses, Whole, pretrain
from moejax.training.placement import place_gradients, place_state
from moejax.training.state import Counters, TrainState


class StepOptions(NamedTuple):
    """What the step's program depends on beside model and optimiser: fields of TrainConfig. Hashable."""

    accumulation_steps: int = 1
    router_bias_rate: float = 1e-3


DEFAULT_OPTIONS = StepOptions()


def step_options(config: TrainConfig) -> StepOptions:
    """The options of a run."""
    return StepOptions(config.accumulation_steps, config.router_bias_rate)


@flax.struct.dataclass
class Measured:
    """What the forward pass of a batch measured; of the parts of a batch, it adds up to that of the batch."""

    losses: Losses
    load: Float[Array, "layers E"]  # how often a token chose each expert, mean over tokens, per MoE layer: a row sums to A
    dropped: Int[Array, ""]


def _train_step(
    model: Transformer, optimizer: optax.GradientTransformation, state: TrainState, batch: Any, options: StepOptions = DEFAULT_OPTIONS
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step on one Batch; the state is donated.

    Where loss or gradient is not finite, everything but the step and the counters stays bit by bit as it was. Metrics are scalars, and
    arrays [MoE layers] for what is measured in each router; the losses are those before the step.
    """
    gradients, measured = compute_gradients(model, state.params, batch, options.accumulation_steps)
    gradients = place_gradients(model, gradients)
    norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(measured.losses.total) & jnp.isfinite(norm)

    def update(params: Any, optimizer_state: Any) -> tuple[Any, Any]:
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        if model.config.router_bias:
            params = move_biases(params, model.config, measured.load, options.router_bias_rate)
        return params, optimizer_state

    # A branch works in the donated buffers as a straight line does; selecting between new and old values would keep both.
    params, optimizer_state = lax.cond(is_finite, update, lambda *unchanged: unchanged, state.params, state.optimizer_state)
    counters = count_step(state.counters, is_finite)
    metrics = {
        "loss": measured.losses.ce,
        "router_aux_loss": measured.losses.aux,
        "router_z_loss": measured.losses.z,
        "grad_norm": norm,
        "tokens_counted": jnp.sum(batch.weights > 0, dtype=jnp.int32),
        "dropped_tokens": measured.dropped,
        "skipped_steps": counters.skipped,
        "skipped_in_a_row": counters.skipped_in_a_row,
        **_router_metrics(measured.load),
    }
    return place_state(model, optimizer, TrainState(state.step + 1, params, optimizer_state, counters)), metrics


train_step = jax.jit(_train_step, static_argnums=(0, 1, 4), donate_argnums=2)


@functools.lru_cache(maxsize=8)
def train_step_for(platform: str, kind: str) -> Any:
    """`train_step`, compiled as moejax/compiler_options.py says for the platform; `kind` is TrainConfig.compiler_options."""
    options = options_for(platform, kind)
    if not options:
        return train_step
    return jax.jit(_train_step, static_argnums=(0, 1, 4), donate_argnums=2, compiler_options=options)


def compute_gradients(model: Transformer, params: Any, batch: Any, parts: int) -> tuple[Any, Measured]:
    """Gradients of the batch's loss, in the parameters' types, and what was measured on the way.

    With several parts, each takes every `parts`-th row, one part after another, and the gradients are added up in float32: activations
    of one part exist at a time, beside one more copy of the gradients. The cross-entropy is that of the whole batch, and so is its
    gradient; the router's losses are means over the parts.
    """
    if parts == 1:
        return _part_gradients(model, params, batch, None, None)
    whole = Whole(jnp.sum(batch.weights, dtype=jnp.float32), parts)
    tokens = jnp.sum(batch.segments != 0, dtype=jnp.float32)

    def add_part(sums: Any, part: Any) -> tuple[Any, None]:
        new = _part_gradients(model, params, part, whole, tokens)
        return jax.tree.map(lambda total, value: total + value.astype(total.dtype), sums, new), None

    gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    (gradients, measured), _ = lax.scan(add_part, (gradients, _nothing_measured(model.config)), split_rows(batch, parts))
    return jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), gradients, params), measured


def split_rows(batch: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...], interleaved: where rows lie on several devices, each of them has its share of every part."""
    return jax.tree.map(lambda rows: jnp.asarray(rows).reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1), batch)


def _part_gradients(model: Transformer, params: Any, batch: Any, whole: Whole | None, tokens: Array | None) -> tuple[Any, Measured]:
    """Gradients of one part's contribution to the loss of the whole, which has `tokens` real tokens."""

    def objective(params: Any):
        losses, outputs = pretrain(model, {"params": params}, batch, whole)
        return losses.total, (losses, outputs)

    gradients, (losses, outputs) = jax.grad(objective, has_aux=True)(params)
    load = _load(model.config, outputs)
    if tokens is not None:
        load = load * (jnp.sum(batch.segments != 0) / jnp.maximum(tokens, 1.0))
    return gradients, Measured(losses, load, outputs.dropped)


def _load(config: ModelConfig, outputs: Outputs) -> Float[Array, "layers E"]:
    if outputs.router_statistics is None:
        return jnp.zeros((0, config.num_experts), jnp.float32)
    return outputs.router_statistics.load


def _nothing_measured(config: ModelConfig) -> Measured:
    zero = jnp.float32(0.0)
    return Measured(Losses(zero, zero, zero, zero), jnp.zeros((len(config.moe_layers), config.num_experts), jnp.float32), jnp.int32(0))


def _router_metrics(load: Float[Array, "layers E"]) -> dict[str, Array]:
    entropy = load_entropy(load)
    return {
        "expert_load_entropy": jnp.mean(entropy) if load.shape[0] else jnp.float32(1.0),
        "expert_load_entropy_per_layer": entropy,
        "expert_load_max_over_mean": load_max_over_mean(load),
    }


def count_step(counters: Counters, is_finite: Array) -> Counters:
    """The counters after a step that was taken (finite) or skipped."""
    return Counters(
        skipped=jnp.where(is_finite, counters.skipped, counters.skipped + 1),
        skipped_in_a_row=jnp.where(is_finite, 0, counters.skipped_in_a_row + 1),
    )


def check_finite(metrics: Mapping[str, Any], config: TrainConfig, step: int) -> None:
    """Raises UserError where the last config.max_nonfinite_steps steps were all skipped; `metrics` are those of `step` (from 1)."""
    in_a_row = int(metrics["skipped_in_a_row"])
    if in_a_row < config.max_nonfinite_steps:
        return
    raise UserError(
        f"loss or gradient was infinite or undefined in steps {step - in_a_row + 1} to {step}, each of which was skipped, and "
        f"train.max_nonfinite_steps={config.max_nonfinite_steps} such steps in a row end a run; lower --train.learning-rate, look at the "
        "data of these steps, and resume from a checkpoint before them"
    )
