"""Balancing experts without a loss (Wang et al. 2024, as in DeepSeek-V3): each has a bias that grows while it gets too few tokens.

The biases are parameters, but no optimiser's: they have no gradient, no moments and no decay, and the step itself moves them.
"""

from collections.abc import Callable
from typing import Any

import optax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

from moejax.config import ModelConfig


def without_biases(tree: Any, parent: str = "") -> Any:
    """A parameter tree (nested dicts) without its routers' biases; equal to it where it has none."""
    if not isinstance(tree, dict):
        return tree
    return {name: without_biases(value, name) for name, value in tree.items() if (parent, name) != ("router", "bias")}


def _map_biases(change: Callable[[tuple[str, ...], Array], Array], tree: Any, path: tuple[str, ...] = ()) -> Any:
    """The tree with `change(path, bias)` in place of every bias of a router."""
    if not isinstance(tree, dict):
        return change(path, tree) if path[-2:] == ("router", "bias") else tree
    return {name: _map_biases(change, value, (*path, name)) for name, value in tree.items()}


def spare_biases(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` for trees that may hold biases: it never sees them, and their updates are 0.

    Unlike optax.masked it leaves the optimiser's state as it is: the names under which checkpoints keep it do not change.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved, state = optimizer.update(without_biases(updates), state, without_biases(params))
        return _put_biases_back(moved, updates), state

    return optax.GradientTransformation(lambda params: optimizer.init(without_biases(params)), update)


def _put_biases_back(updates: Any, full: Any) -> Any:
    """`updates` with zeros where `full` has a bias and they have nothing."""
    if not isinstance(full, dict):
        return updates
    return {name: _put_biases_back(updates[name], value) if name in updates else jnp.zeros_like(value) for name, value in full.items()}


def move_biases(params: Any, config: ModelConfig, load: Float[Array, "layers E"], rate: float) -> Any:
    """Parameters after one step of balancing: bias += rate * sign(mean load - load), per layer (Wang et al. 2024, algorithm 1).

    load: how often each expert of each MoE layer was chosen in the step. Works on the stacked tree and on the unrolled one.
    """
    change = rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    periods = config.num_layers // config.moe_every

    def move(path: tuple[str, ...], bias: Array) -> Array:
        if path[0] == "layers":  # the last block of each period, periods in order
            return bias + change[:periods]
        return bias + change[config.moe_layers.index(int(path[0].removeprefix("layer_")))]

    return _map_biases(move, params)


def load_max_over_mean(load: Float[Array, "layers E"]) -> Float[Array, "layers"]:
    """The busiest expert's share of the tokens over the mean share, per layer: 1 is perfect balance, E / A the worst."""
    return jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9)


def load_entropy(load: Float[Array, "layers E"]) -> Float[Array, "layers"]:
    """Entropy of the experts' shares of the tokens over its maximum, log E, per layer: 1 is perfect balance."""
    experts = load.shape[-1]
    if experts == 1:
        return jnp.ones(load.shape[:1], jnp.float32)
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1e-9)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-9)), axis=-1)
    return entropy / jnp.log(jnp.float32(experts))
