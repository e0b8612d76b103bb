"""The experts' MLP on sorted rows: down(silu(gate x) * up x), each row with the weights of its group.

`expert_mlp` picks by the platform it is compiled for. On CPU one loop over blocks of rows does all three matmuls of a block while
it is in cache, forward and backward; elsewhere three grouped matmuls. `expert_mlp_reference`, the three, is what both are tested against.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.ops.grouped import SPARE_ROWS, group_starts, grouped_matmul, over_blocks, pad_rows
from moejax.ops.matmul import as_output_major, precision_of, project


class ExpertWeights(NamedTuple):
    """The three weights of every expert, output-major. On one CPU an engine puts `ops.matmul.InputMajor` ones in their places."""

    gate: Float[Array, "E F D"]
    up: Float[Array, "E F D"]
    down: Float[Array, "E D F"]


def expert_mlp(rows: Float[Array, "M D"], weights: ExpertWeights, group_sizes: Int[Array, "E"], spare_rows: int = 0) -> Float[Array, "M D"]:
    """Group e's rows through expert e; sizes sum to M - spare_rows, as in `ops.grouped.grouped_matmul`."""
    return lax.platform_dependent(
        rows,
        weights,
        group_sizes,
        cpu=functools.partial(expert_mlp_blocked, spare_rows=spare_rows),
        default=functools.partial(expert_mlp_reference, spare_rows=spare_rows),
    )


def expert_mlp_reference(
    rows: Float[Array, "M D"], weights: ExpertWeights, group_sizes: Int[Array, "E"], spare_rows: int = 0
) -> Float[Array, "M D"]:
    """Three grouped matmuls, all rows at once."""
    gate, up, down = as_output_major(weights)
    hidden = jax.nn.silu(grouped_matmul(rows, gate, group_sizes, spare_rows)) * grouped_matmul(rows, up, group_sizes, spare_rows)
    return grouped_matmul(hidden, down, group_sizes, spare_rows)


def expert_mlp_blocked(
    rows: Float[Array, "M D"], weights: ExpertWeights, group_sizes: Int[Array, "E"], spare_rows: int = 0
) -> Float[Array, "M D"]:
    """Block by block; only the rows' own work, and nothing [M, F] wide but what the backward pass needs."""
    out = jnp.asarray(_blocked(pad_rows(rows, spare_rows), weights, group_sizes))
    return out[: rows.shape[0]]


@jax.custom_vjp
def _blocked(rows: Array, weights: ExpertWeights, group_sizes: Array) -> Array:
    return _run(rows, weights, group_sizes, keep=False)[0]


def _forward(rows: Array, weights: ExpertWeights, group_sizes: Array):
    out, kept = _run(rows, weights, group_sizes, keep=True)
    return out, (rows, weights, group_sizes, kept)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    return lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())), precision=precision_of(left.dtype))


def _slice(rows: Array, first: Array, count: int) -> Array:
    return lax.dynamic_slice_in_dim(rows, first, count, 0)


def _put(into: Array, rows: Array, first: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(into, rows, first, 0)


@functools.partial(jax.jit, static_argnames="keep")
def _run(rows: Array, weights: ExpertWeights, group_sizes: Array, keep: bool) -> tuple[Array, Any]:
    """(results, what gate and up gave if `keep`). A block may write past its group; groups go in order, so the next writes there again."""
    width = weights.gate.shape[1]
    kept = (jnp.zeros((rows.shape[0], width), rows.dtype),) * 2 if keep else None

    def group(carry, inputs):
        weight, start, size = inputs

        def block(first, count, carry):
            out, kept = carry
            x = _slice(rows, first, count)
            gate, up = project(x, weight.gate), project(x, weight.up)
            out = _put(out, project(jax.nn.silu(gate) * up, weight.down), first)
            return out, None if kept is None else (_put(kept[0], gate, first), _put(kept[1], up, first))

        return over_blocks(start, size, rows.shape[0] - SPARE_ROWS, block, carry), None

    carry, _ = lax.scan(group, (jnp.zeros_like(rows), kept), (weights, group_starts(group_sizes), group_sizes))
    return carry


@jax.jit
def _backward(saved, gradient: Array):
    rows, weights, group_sizes, (gates, ups) = saved

    def group(row_gradient, inputs):
        weight, start, size = inputs

        def block(first, count, carry):
            row_gradient, totals = carry
            mine = (first + jnp.arange(count) < start + size)[:, None]  # the last block reaches into the next group's rows
            x, gate, up = (_slice(array, first, count) for array in (rows, gates, ups))
            dy = jnp.where(mine, _slice(gradient, first, count), 0)
            sigmoid = jax.nn.sigmoid(gate)
            hidden_gradient = _dot(dy, weight.down, 1, 0)
            up_gradient = hidden_gradient * gate * sigmoid
            gate_gradient = hidden_gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
            dx = _dot(gate_gradient, weight.gate, 1, 0) + _dot(up_gradient, weight.up, 1, 0)
            shares = ExpertWeights(_dot(gate_gradient, x, 0, 0), _dot(up_gradient, x, 0, 0), _dot(dy, gate * sigmoid * up, 0, 0))
            return _put(row_gradient, dx, first), jax.tree.map(jnp.add, totals, shares)

        zeros = jax.tree.map(jnp.zeros_like, weight)
        return over_blocks(start, size, rows.shape[0] - SPARE_ROWS, block, (row_gradient, zeros))

    starts = group_starts(group_sizes)
    row_gradient, weight_gradient = lax.scan(group, jnp.zeros_like(rows), (weights, starts, group_sizes))
    return row_gradient, weight_gradient, None


_blocked.defvjp(_forward, _backward)
