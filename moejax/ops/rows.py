"""Rows moved from one order to another, as gathers both ways; and what dispatches do with them beside: count, sort, weigh, add up.

The derivative XLA makes of a gather is a scatter-add, which is slow on every platform. Who moves rows knows where each one went, so
the gradient is written as a gather by that.
"""

import functools

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int


@jax.custom_vjp
def take_rows(rows: Float[Array, "R D"], index: Int[Array, "N"], places: Int[Array, "R K"]) -> Float[Array, "N D"]:
    """rows[index], zeros where `index` is R (no row). places[r] are the up to K places where row r is taken to; N is none."""
    return _take(rows, index)


def _take(rows: Array, index: Array) -> Array:
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _backward(places: Array, gradient: Array):
    num_rows, most = places.shape
    taken = _take(gradient, places.T.reshape(-1)).reshape(most, num_rows, -1)
    return functools.reduce(jnp.add, taken), None, None  # as in combine_rows


take_rows.defvjp(lambda rows, index, places: (_take(rows, index), places), _backward)


def invert(index: Int[Array, "N"], num_rows: int) -> Int[Array, "R"]:
    """For each of `num_rows` rows the one place n with index[n] == row; N where there is none. A row may be named once only."""
    nowhere = jnp.full(num_rows, index.shape[0], jnp.int32)
    return nowhere.at[index].set(jnp.arange(index.shape[0], dtype=jnp.int32), mode="drop", unique_indices=False)


def count_groups(groups: Int[Array, "N"], num_groups: int) -> Int[Array, "num_groups"]:
    """How many entries each of the groups 0..num_groups-1 has; entries of other groups count nowhere."""
    return jnp.sum(groups[:, None] == jnp.arange(num_groups)[None, :], axis=0).astype(jnp.int32)


def sort_groups(groups: Int[Array, "N"]) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """(order, place): order[i] is the entry that stands i-th when sorted by group, equal ones as they came; place undoes it."""
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    return order, jnp.argsort(order).astype(jnp.int32)


@jax.custom_vjp
def combine_rows(
    weights: Float[Array, "M A"], outputs: Float[Array, "R D"], place: Int[Array, "MA"], choice: Int[Array, "R"]
) -> Float[Array, "M D"]:
    """The outputs of each row's choices, added up in float32 with their weights; in the type of `outputs`.

    place[n] is where the output of choice n (row * A + rank) lies, R for none; choice[r] is whose output r is, M * A for nobody's.
    All first choices are brought back before all second ones, and ranks are added one by one: as [M, A, D] a TPU would keep A rows of D in
    tiles of eight, and a sum over an axis of two takes it ten times as long as an addition.
    """
    return _combine(weights, outputs, place)[0]


def _combine(weights: Array, outputs: Array, place: Array) -> tuple[Array, Array]:
    """The sum, and the outputs [A, M, D] that were added."""
    num_rows, per_token = weights.shape
    by_rank = _take(outputs, place.reshape(num_rows, per_token).T.reshape(-1)).reshape(per_token, num_rows, -1)
    parts = [weights[:, rank, None] * by_rank[rank].astype(jnp.float32) for rank in range(per_token)]
    return functools.reduce(jnp.add, parts).astype(outputs.dtype), by_rank


def _combine_forward(weights: Array, outputs: Array, place: Array, choice: Array):
    y, by_rank = _combine(weights, outputs, place)
    return y, (weights, by_rank, choice)


def _combine_backward(saved, gradient: Array):
    weights, by_rank, choice = saved
    share = jnp.take(weights.reshape(-1), choice, mode="fill", fill_value=0)
    to_outputs = share[:, None] * _take(gradient, choice // weights.shape[1]).astype(jnp.float32)
    wide = gradient.astype(jnp.float32)
    to_weights = [jnp.sum(rank.astype(jnp.float32) * wide, axis=1) for rank in by_rank]
    return jnp.stack(to_weights, axis=1), to_outputs.astype(by_rank.dtype), None, None


combine_rows.defvjp(_combine_forward, _combine_backward)
