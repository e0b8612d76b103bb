"""Moves of rows from one order to another, as gathers both ways.

The derivative XLA makes of a gather is a scatter-add, which is slow on every platform. Who moves rows knows where each one went, so
the gradient is written as a gather by that.
"""

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
    taken = _take(gradient, places.reshape(-1)).reshape(*places.shape, -1)
    return jnp.sum(taken, axis=1), None, None


take_rows.defvjp(lambda rows, index, places: (_take(rows, index), places), _backward)


def invert(index: Int[Array, "N"], num_rows: int) -> Int[Array, "R"]:
    """For each of `num_rows` rows the one place n with index[n] == row; N where there is none. A row may be named once only."""
    nowhere = jnp.full(num_rows, index.shape[0], jnp.int32)
    return nowhere.at[index].set(jnp.arange(index.shape[0], dtype=jnp.int32), mode="drop", unique_indices=False)
