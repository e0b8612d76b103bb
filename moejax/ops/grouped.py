"""Grouped matmul: rows sorted by group, each group of rows times its own output-major weight.

`grouped_matmul` picks by the platform it is compiled for: blocks of rows on CPU, `lax.ragged_dot` elsewhere. XLA's
`ragged_dot` on CPU multiplies every row by every expert, E times the work; the blocks below do only the rows' own.
`grouped_matmul_reference` is the slow truth both are tested against.
"""

import functools
from collections.abc import Callable

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.ops.matmul import precision_of

BLOCK_ROWS = 256  # rows of one matmul: enough to keep two cores busy, few enough that a block stays in cache
TAIL_ROWS = 32  # the rest of a group goes in blocks of this many, so that at most 31 rows are computed for nothing

Rows = Float[Array, "M inside"]
Weights = Float[Array, "E outside inside"]
Sizes = Int[Array, "E"]


def grouped_matmul_reference(x: Rows, weights: Weights, group_sizes: Sizes) -> Float[Array, "M outside"]:
    """Every row times every weight, then the row's own result kept: E times the work, plainly right."""
    group_of_row = jnp.repeat(jnp.arange(weights.shape[0]), group_sizes, total_repeat_length=x.shape[0])
    everything = jnp.einsum("mi,eoi->meo", x, weights, precision=precision_of(x.dtype))
    mine = group_of_row[:, None] == jnp.arange(weights.shape[0])[None, :]
    return jnp.sum(jnp.where(mine[:, :, None], everything, 0), axis=1)


def grouped_matmul(x: Rows, weights: Weights, group_sizes: Sizes) -> Float[Array, "M outside"]:
    """y[m] = W[g(m)] x[m], where the first group_sizes[0] rows belong to group 0, and so on; sizes sum to M."""
    return lax.platform_dependent(x, weights, group_sizes, cpu=grouped_matmul_blocked, default=grouped_matmul_ragged)


def grouped_matmul_ragged(x: Rows, weights: Weights, group_sizes: Sizes) -> Float[Array, "M outside"]:
    """Through `lax.ragged_dot_general`, which TPUs run as one kernel."""
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return lax.ragged_dot_general(x, weights, group_sizes, dimensions, precision=precision_of(x.dtype))


@jax.custom_vjp
def grouped_matmul_blocked(x: Rows, weights: Weights, group_sizes: Sizes) -> Float[Array, "M outside"]:
    """In blocks of one group's rows; forward, row gradient and weight gradient all do only the rows' own work."""
    return _multiply(x, weights, group_sizes, transpose=False)


def _forward(x: Rows, weights: Weights, group_sizes: Sizes):
    return _multiply(x, weights, group_sizes, transpose=False), (x, weights, group_sizes)


def _backward(saved, gradient):
    x, weights, group_sizes = saved
    return _multiply(gradient, weights, group_sizes, transpose=True), _weight_gradient(x, gradient, group_sizes), None


grouped_matmul_blocked.defvjp(_forward, _backward)


def _over_blocks(start: Array, size: Array, num_rows: int, body: Callable, carry):
    """Folds `body(first row, number of rows, carry)` over a group's rows: whole blocks, then tail blocks.

    The last tail block reaches at most TAIL_ROWS - 1 rows past the group, so callers pad their rows by TAIL_ROWS.
    """
    whole = size // BLOCK_ROWS if num_rows >= BLOCK_ROWS else 0
    carry = carry if num_rows < BLOCK_ROWS else lax.fori_loop(0, whole, lambda i, c: body(start + i * BLOCK_ROWS, BLOCK_ROWS, c), carry)
    rest = start + whole * BLOCK_ROWS
    tails = (size - whole * BLOCK_ROWS + TAIL_ROWS - 1) // TAIL_ROWS
    return lax.fori_loop(0, tails, lambda i, c: body(rest + i * TAIL_ROWS, TAIL_ROWS, c), carry)


def _pad_tail(rows: Array) -> Array:
    return jnp.pad(rows, ((0, TAIL_ROWS), (0, 0)))


def _group_starts(group_sizes: Array) -> Array:
    return (jnp.cumsum(group_sizes) - group_sizes).astype(group_sizes.dtype)


@functools.partial(jax.jit, static_argnames="transpose")
def _multiply(x: Array, weights: Array, group_sizes: Array, transpose: bool) -> Array:
    """Rows times their group's weight, W x or (transpose) Wᵀ x.

    A group's last block may write into the next group's rows; groups go in order, so those rows are written again, rightly.
    """
    num_rows, (_, outside, inside) = x.shape[0], weights.shape
    padded = _pad_tail(x)
    contract = (((1,), (0 if transpose else 1,)), ((), ()))

    def group(out, inputs):
        weight, start, size = inputs

        def block(first, count, out):
            rows = lax.dynamic_slice_in_dim(padded, first, count, 0)
            result = lax.dot_general(rows, weight, contract, precision=precision_of(x.dtype))
            return lax.dynamic_update_slice_in_dim(out, result, first, 0)

        return _over_blocks(start, size, num_rows, block, out), None

    out = jnp.zeros((num_rows + TAIL_ROWS, inside if transpose else outside), x.dtype)
    out, _ = lax.scan(group, out, (weights, _group_starts(group_sizes), group_sizes))
    return out[:num_rows]


@jax.jit
def _weight_gradient(x: Array, gradient: Array, group_sizes: Array) -> Array:
    """Sum over a group's rows of gradient ⊗ x, for every group: [E, out, in]; zeros for a group without rows."""
    padded_x, padded_gradient = _pad_tail(x), _pad_tail(gradient)
    shape = (gradient.shape[1], x.shape[1])

    def group(carry, inputs):
        start, size = inputs

        def block(first, count, total):
            mine = (first + jnp.arange(count) < start + size)[:, None]  # a tail block reaches into the next group's rows
            left = jnp.where(mine, lax.dynamic_slice_in_dim(padded_gradient, first, count, 0), 0)
            right = lax.dynamic_slice_in_dim(padded_x, first, count, 0)
            outer = lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=precision_of(x.dtype))
            return total + outer

        return carry, _over_blocks(start, size, x.shape[0], block, jnp.zeros(shape, x.dtype))

    return lax.scan(group, None, (_group_starts(group_sizes), group_sizes))[1]
