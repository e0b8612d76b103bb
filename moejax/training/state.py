"""What a run carries from step to step, and the optimiser that moves it."""

import functools
from typing import Any

import flax.struct
import jax
import optax
from jax import Array
from jax import numpy as jnp

from moejax.config import DEFAULT_STEPS, TrainConfig
from moejax.model.transformer import Transformer, init_parameters


@flax.struct.dataclass
class TrainState:
    """Number of steps taken, float32 master weights (or config.param_dtype), and the optimiser's own state."""

    step: Array
    params: Any
    optimizer_state: Any


def learning_rate_schedule(config: TrainConfig, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then flat or a cosine down to final_learning_rate_fraction of it at the last step."""
    steps = DEFAULT_STEPS if config.steps is None else config.steps
    warmup = min(config.warmup_steps, steps)
    if config.schedule == "constant":
        after: optax.Schedule = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - 1 - warmup, 1), config.final_learning_rate_fraction)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), after], [warmup])


def _names(path: tuple) -> list[str]:
    return [entry.key for entry in path]


def _is_matrix(path: tuple) -> bool:
    """Whether a leaf is a matmul weight inside a layer: not a norm, the router, the embedding or the head."""
    names = _names(path)
    return names[-1] == "kernel" and not {"router", "head"} & set(names)


def decay_mask(params: Any) -> Any:
    """True for every matmul weight, embedding and head; False for norm scales and the router."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] != "scale" and "router" not in _names(path), params)


def muon_dimensions(params: Any) -> Any:
    """Which axes of each leaf Muon takes as a matrix: the last two of a layer's kernels, output-major; None is left to AdamW.

    Axes in front (layers, experts) are orthogonalised independently.
    """

    def dimensions(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if not _is_matrix(path):
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 1, output_axis=leaf.ndim - 2)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def create_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024) with AdamW beside it."""
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.optimizer == "adamw":
        rate = learning_rate_schedule(config, config.learning_rate)
        return optax.chain(clip, optax.adamw(rate, config.beta_1, config.beta_2, weight_decay=config.weight_decay, mask=decay_mask))
    return optax.chain(
        clip,
        optax.contrib.muon(
            learning_rate_schedule(config, config.learning_rate),
            weight_decay=config.weight_decay,
            adam_learning_rate=learning_rate_schedule(config, config.adam_learning_rate),
            adam_b1=config.beta_1,
            adam_b2=config.beta_2,
            muon_weight_dimension_numbers=muon_dimensions,
        ),
    )


def _create(model: Transformer, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    params = init_parameters(model, key)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


_create_compiled = jax.jit(_create, static_argnums=(0, 1))


def create_state(model: Transformer, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, initialised under jit: the weights appear once, where they stay."""
    return _create_compiled(model, optimizer, jax.random.key(seed))


def begin_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The state before the first step on given weights. They are copied: the first step gives away the buffers it gets."""
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))


def abstract_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and types of the state, nothing allocated."""
    return jax.eval_shape(functools.partial(_create, model, optimizer), jax.random.key(0))
