"""Which experts see a token and with what weight, and the losses that keep the experts evenly used. All in float32."""

from typing import Literal, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

Top1Weight = Literal["one", "probability"]


class Routing(NamedTuple):
    """A token's experts, best first, and the weight of each one's output."""

    weights: Float[Array, "*rows A"]
    experts: Int[Array, "*rows A"]


class RouterStatistics(NamedTuple):
    """What one layer's router did, averaged over the rows that count."""

    probability: Float[Array, "E"]  # mean softmax probability of each expert
    load: Float[Array, "E"]  # selections of each expert per row; sums to A
    z_loss: Float[Array, ""]  # mean squared log-sum-exp of the logits


def route(logits: Float[Array, "M E"], experts_per_token: int, top_1_weight: Top1Weight, bias: Float[Array, "E"] | None = None) -> Routing:
    """Softmax over all experts, the A largest, divided by their sum.

    For A = 1 that sum leaves a weight of exactly one (Mixtral); `top_1_weight="probability"` keeps the softmax value (Arctic).
    With a `bias`, the A experts of largest probability + bias are chosen; their weights are those of the probabilities alone, and
    no gradient flows to it (Wang et al. 2024, Auxiliary-Loss-Free Load Balancing, eq. 3).
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    scores = probabilities if bias is None else probabilities + bias.astype(jnp.float32)[None, :]
    _, experts = lax.top_k(lax.stop_gradient(scores), experts_per_token)
    weights = pick_experts(probabilities, experts)
    if experts_per_token > 1 or top_1_weight == "one":
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(weights, experts)


def pick_experts(values: Float[Array, "M E"], experts: Int[Array, "M A"]) -> Float[Array, "M A"]:
    """Each row's values of its experts. By comparison instead of a gather: the gradient is then a product, not a scatter."""
    chosen = experts[:, :, None] == jnp.arange(values.shape[-1])[None, None, :]
    return jnp.sum(jnp.where(chosen, values[:, None, :], 0.0), axis=-1)


def router_statistics(logits: Float[Array, "M E"], experts: Int[Array, "M A"], counts: Bool[Array, "M"] | None) -> RouterStatistics:
    """Averages over the rows where `counts` is true (all rows when None); rows of no count leave zeros, never NaN."""
    logits = logits.astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    chosen = jnp.sum(experts[:, :, None] == jnp.arange(logits.shape[-1])[None, None, :], axis=1).astype(jnp.float32)
    squared_normaliser = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    share = jnp.ones(logits.shape[:1], jnp.float32) if counts is None else counts.astype(jnp.float32)
    share = share / jnp.maximum(jnp.sum(share), 1.0)
    return RouterStatistics(
        probability=jnp.sum(share[:, None] * probabilities, axis=0),
        load=jnp.sum(share[:, None] * chosen, axis=0),
        z_loss=jnp.sum(share * squared_normaliser),
    )


def load_balance_loss(statistics: RouterStatistics, kind: Literal["pooled", "per_layer"]) -> Float[Array, ""]:
    """E * sum over experts of load * probability (Switch Transformer, Fedus et al. 2021, eq. 4), over layers [L, E].

    "pooled" averages load and probability over all layers first (Hugging Face Mixtral: perfect balance gives A);
    "per_layer" sums the layers' losses (Arctic: perfect balance gives A * L).
    """
    probability, load = statistics.probability, statistics.load
    num_experts = probability.shape[-1]
    if kind == "pooled":
        probability, load = jnp.mean(probability, axis=0, keepdims=True), jnp.mean(load, axis=0, keepdims=True)
    return num_experts * jnp.sum(load * probability)
