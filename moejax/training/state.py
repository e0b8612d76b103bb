"""What a run carries from step to step, and the optimiser that moves it."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import optax
from jax import Array
from jax import numpy as jnp

from moejax.config import DEFAULT_STEPS, TrainConfig
from moejax.model.transformer import Transformer, init_parameters
from moejax.training.balancing import spare_biases
from moejax.training.placement import describe_placed, place_state


@flax.struct.dataclass
class Counters:
    """int32 scalars. skipped: steps so far whose loss or gradient was not finite; skipped_in_a_row: those since the last that was."""

    skipped: Array
    skipped_in_a_row: Array


@flax.struct.dataclass
class TrainState:
    """Number of steps taken (skipped ones too), float32 master weights (or config.param_dtype), the optimiser's own state, counters."""

    step: Array
    params: Any
    optimizer_state: Any
    counters: Counters


def learning_rate_schedule(config: TrainConfig, peak: float, steps: int | None = None) -> optax.Schedule:
    """Linear warm-up to `peak`, then what config.schedule says, down to final_learning_rate_fraction of it at the last step.

    cosine and linear come down at once; wsd (warm-up, stable, decay: Hu et al. 2024) stays until the last decay_fraction of the steps
    and comes down in a straight line; constant never does. `steps`: of the whole run, where its stages decide (RunConfig.steps).
    """
    steps = steps or config.steps or DEFAULT_STEPS
    warmup = min(config.warmup_steps, steps)
    last = steps - 1 - warmup  # counted from the end of the warm-up, at which the rate is the peak
    final = config.final_learning_rate_fraction
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(last, 1), final)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final * peak, max(last, 1))
    elif config.schedule == "wsd" and min(round(config.decay_fraction * steps), last) > 0:
        decay = min(round(config.decay_fraction * steps), last)
        after = optax.linear_schedule(peak, final * peak, decay, transition_begin=last - decay)
    else:
        after = optax.constant_schedule(peak)
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
    """True for every matmul weight, embedding and head; False for norm scales and routers, biases of theirs included."""
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


def create_optimizer(config: TrainConfig, steps: int | None = None) -> optax.GradientTransformation:
    """Clipping by the global norm, then config.optimizer; `steps` as in learning_rate_schedule. Biases of routers are not its business.

    AdamW (Loshchilov & Hutter 2019), Lion (Chen et al. 2023), Adafactor (Shazeer & Stern 2018), or Muon (Jordan et al. 2024) with AdamW
    beside it. All but Muon decay what decay_mask says; Muon decays the matrices it moves.
    """
    rate = learning_rate_schedule(config, config.learning_rate, steps)
    if config.optimizer == "adamw":
        rule = optax.adamw(rate, config.beta_1, config.beta_2, weight_decay=config.weight_decay, mask=decay_mask)
    elif config.optimizer == "lion":
        rule = optax.lion(rate, config.beta_1, config.beta_2, weight_decay=config.weight_decay, mask=decay_mask)
    elif config.optimizer == "adafactor":
        rule = _adafactor(rate, config.weight_decay)
    else:
        rule = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_learning_rate=learning_rate_schedule(config, config.adam_learning_rate, steps),
            adam_b1=config.beta_1,
            adam_b2=config.beta_2,
            muon_weight_dimension_numbers=muon_dimensions,
        )
    return spare_biases(optax.chain(optax.clip_by_global_norm(config.clip_norm), rule))


def _adafactor(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Adafactor's second moments, in AdamW's place: a learning rate means what it means there.

    optax.adafactor is not that: it multiplies updates by the RMS of the weights, and its decay is not multiplied by the learning rate
    (0.1 would take a tenth of every weight away at each step). Second moments are factored over the two largest axes of a leaf, which
    in stacked experts [layers, E, F, D] are the matrix as long as it is larger than the numbers of layers and of experts; matrices
    with a side below 128 keep them whole. Their decay, 1 - t^-0.8, ends at 0.999 (Zhai et al. 2021): t grows without end.
    """

    def decay(count: Any, exponent: Any) -> Array:
        return jnp.minimum(1.0 - jnp.asarray(count + 1, jnp.float32) ** -exponent, 0.999)

    return optax.chain(
        optax.scale_by_factored_rms(decay_rate_fn=decay),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(rate),
    )


def _no_counts() -> Counters:
    return Counters(jnp.int32(0), jnp.int32(0))


def _create(model: Transformer, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    params = init_parameters(Transformer(model.config), key)
    return place_state(model, optimizer, TrainState(jnp.int32(0), params, optimizer.init(params), _no_counts()))


_create_compiled = jax.jit(_create, static_argnums=(0, 1))


def create_state(model: Transformer, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, initialised under jit: the weights appear once, where they stay."""
    return _create_compiled(model, optimizer, jax.random.key(seed))


def _begin(model: Transformer, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    params = jax.tree.map(jnp.copy, params)
    return place_state(model, optimizer, TrainState(jnp.int32(0), params, optimizer.init(params), _no_counts()))


def begin_state(model: Transformer, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The state before the first step on given weights. They are copied: the first step gives away the buffers it gets."""
    return jax.jit(_begin, static_argnums=(0, 1))(model, optimizer, params)


def abstract_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, types and, on a mesh, shardings of the state; nothing allocated."""
    shapes = jax.eval_shape(functools.partial(_create, Transformer(model.config), optimizer), jax.random.key(0))
    return describe_placed(model, optimizer, shapes)


def stored_part(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps of a state beside its step and its parameters, as one tree."""
    return {"optimizer": state.optimizer_state, "counters": state.counters}


def rebuild(step: int, params: Any, stored: Mapping[str, Any]) -> TrainState:
    """The state of a checkpoint: the reverse of `stored_part`."""
    return TrainState(jnp.int32(step), params, stored["optimizer"], stored["counters"])
