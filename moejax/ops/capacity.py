"""Experts with a fixed number of slots: which tokens get one, and what the others weigh. DeepSpeed's top-1 and top-2 gates.

Every expert has `capacity` slots for the rows of one data shard; a choice that finds none is dropped, and counted. The semantics are
those of deepspeed/moe/sharded_moe.py (top1gating, top2gating) with the noise as an argument: nothing here draws numbers.
"""

import math
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.ops.grouped import group_starts
from moejax.ops.routing import Routing, load_balance_loss, pick_experts, router_statistics
from moejax.ops.rows import count_groups

EPSILON = float(jnp.finfo(jnp.float32).eps)


class Slots(NamedTuple):
    """Where each choice goes: `slot` is expert * capacity + position, or E * capacity for a choice that is dropped.

    `choice` says the reverse for each slot: row * A + rank, or M * A for a slot that stays empty. `routing.weights` are 0 for dropped ones.
    """

    routing: Routing
    slot: Int[Array, "M A"]
    choice: Int[Array, "slots"]
    dropped: Int[Array, ""]  # choices without a slot


def expert_capacity(num_rows: int, num_experts: int, experts_per_token: int, factor: float, minimum: int) -> int:
    """Slots of one expert for `num_rows` rows of a shard: max(ceil(rows / experts * factor * A), minimum), at most one per row."""
    wanted = math.ceil(num_rows / num_experts * factor * experts_per_token - 1e-6)
    return min(max(wanted, minimum, 1), num_rows)


def choose_experts(logits: Float[Array, "M E"], experts_per_token: int, noise: Float[Array, "M E"] | None = None) -> Routing:
    """Experts and unnormalised softmax probabilities, best first; `noise` (Gumbel) moves the choice of all but the first."""
    logits = logits.astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    first = jnp.argmax(lax.stop_gradient(logits), axis=-1)
    experts = first[:, None]
    if experts_per_token > 1:
        others = lax.stop_gradient(logits) if noise is None else lax.stop_gradient(logits) + noise
        others = jnp.where(jax.nn.one_hot(first, logits.shape[-1], dtype=bool), -jnp.inf, others)
        experts = jnp.concatenate([experts, lax.top_k(others, experts_per_token - 1)[1]], axis=1)
    return Routing(pick_experts(probabilities, experts), experts.astype(jnp.int32))


def assign_slots(chosen: Routing, num_experts: int, capacity: int, priority: Float[Array, "M E"] | None = None) -> Slots:
    """Slots of `choose_experts`' choices, and the weights that are left.

    First choices take slots in the order of the rows, then second ones. With one expert a token, `priority` (DeepSpeed draws it
    uniformly: random token selection) decides who gets a slot where an expert is asked for by too many; the largest win. Expert E, one
    past the last, is none: it takes no slot and is not dropped. The weight of a single expert is its probability; of several,
    probabilities over the sum of those that were not dropped.
    """
    experts = chosen.experts
    num_rows, per_token = experts.shape
    by_rank = experts.T.reshape(-1)  # all first choices, then all second ones
    loser = jnp.zeros(by_rank.shape, jnp.int32)
    if priority is not None and per_token == 1:
        draws = jnp.take_along_axis(priority, experts, axis=1)[:, 0]
        loser = (_position_in_group(by_rank, jnp.lexsort((-draws, by_rank)), num_experts) >= capacity).astype(jnp.int32)
    order = jnp.argsort(by_rank * 2 + loser, stable=True)
    position = _position_in_group(by_rank, order, num_experts)
    kept = ((position < capacity) & (by_rank < num_experts)).reshape(per_token, num_rows).T
    slot = jnp.where(kept, (by_rank * capacity + position).reshape(per_token, num_rows).T, num_experts * capacity)
    weights = jnp.where(kept, chosen.weights, 0.0)
    if per_token > 1:
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), EPSILON)
    sizes, inside = count_groups(by_rank, num_experts), jnp.arange(capacity)[None, :]
    asked = jnp.take(order, jnp.minimum(group_starts(sizes)[:, None] + inside, by_rank.shape[0] - 1))  # in rank-major order
    choice = jnp.where(inside < sizes[:, None], asked % num_rows * per_token + asked // num_rows, num_rows * per_token)
    dropped = jnp.sum(~kept & (experts < num_experts)).astype(jnp.int32)
    return Slots(Routing(weights, experts), slot.astype(jnp.int32), choice.reshape(-1).astype(jnp.int32), dropped)


def _position_in_group(groups: Int[Array, "N"], order: Int[Array, "N"], num_groups: int) -> Int[Array, "N"]:
    """How many of its group come before each entry in `order`, which sorts by group."""
    return jnp.argsort(order) - group_starts(count_groups(groups, num_groups + 1))[groups]


def first_choice_loss(logits: Float[Array, "M E"], experts: Int[Array, "M A"], counts: Bool[Array, "M"] | None = None) -> Float[Array, ""]:
    """E * sum over experts of mean probability * share of first choices (Switch Transformer, eq. 4; DeepSpeed's l_aux)."""
    return load_balance_loss(router_statistics(logits, experts[:, :1], counts), "per_layer")
