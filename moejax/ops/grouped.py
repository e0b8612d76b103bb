"""Grouped matmul: rows sorted by group, each group of rows times its own output-major weight.

`grouped_matmul` picks by the platform it is compiled for: blocks of rows on CPU, the kernels of `ops.grouped_cuda` on NVIDIA GPUs,
`lax.ragged_dot` elsewhere, on TPUs with the weights' gradient of `ops.grouped_tpu`. XLA's `ragged_dot` on CPU and GPU multiplies every
row by every expert, E times the work; the blocks below do only the rows' own. `grouped_matmul_reference` is the slow truth that all
are tested against.
"""

import functools
from collections.abc import Callable

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.ops import grouped_cuda, grouped_tpu
from moejax.ops.matmul import precision_of
from moejax.ops.platforms import say_once, trace_at_lowering

# Rows of one matmul: as many of the largest as fit into a group, then one that takes the rest. Fewer, larger blocks keep the cores busy and
# add to a weight's gradient less often; the steps between the sizes bound the rows computed for nothing.
BLOCK_ROWS = (16, 32, 64, 96, 128, 160, 192, 224, 256)
# Rows a caller may append that belong to no group. With them, blocks that reach past the last group need no padded copies of the rows.
SPARE_ROWS = 32  # the widest step

SPARE_TILE = 512  # rows, of the kernels on TPUs
MANY_ROWS = 8192

Rows = Float[Array, "M inside"]
Weights = Float[Array, "E outside inside"]
Sizes = Int[Array, "E"]


def count_spare_rows(num_rows: int) -> int:
    """How many spare rows to put behind `num_rows`: SPARE_ROWS, and behind many as many more as make all of them whole tiles.

    A kernel takes rows in whole tiles, and a large array that is not made of them is copied into one that is.
    """
    return SPARE_ROWS + (-(num_rows + SPARE_ROWS) % SPARE_TILE if num_rows >= MANY_ROWS else 0)


def grouped_matmul_reference(x: Rows, weights: Weights, group_sizes: Sizes) -> Float[Array, "M outside"]:
    """Every row times every weight, then the row's own result kept: E times the work, plainly right."""
    group_of_row = jnp.repeat(jnp.arange(weights.shape[0]), group_sizes, total_repeat_length=x.shape[0])
    everything = jnp.einsum("mi,eoi->meo", x, weights, precision=precision_of(x.dtype))
    mine = group_of_row[:, None] == jnp.arange(weights.shape[0])[None, :]
    return jnp.sum(jnp.where(mine[:, :, None], everything, 0), axis=1)


def grouped_matmul(x: Rows, weights: Weights, group_sizes: Sizes, spare_rows: int = 0) -> Float[Array, "M outside"]:
    """y[m] = W[g(m)] x[m], where the first group_sizes[0] rows belong to group 0, and so on; sizes sum to M - spare_rows.

    The last `spare_rows` rows belong to no group: their results are finite where x is, but mean nothing.
    """
    blocked, cuda = (functools.partial(way, spare_rows=spare_rows) for way in (grouped_matmul_blocked, grouped_matmul_cuda))
    return lax.platform_dependent(x, weights, group_sizes, cpu=blocked, cuda=cuda, tpu=grouped_matmul_tpu, default=grouped_matmul_ragged)


def grouped_matmul_ragged(x: Rows, weights: Weights, group_sizes: Sizes) -> Float[Array, "M outside"]:
    """Through `lax.ragged_dot_general`, which TPUs run as one kernel. On a GPU XLA makes it dense."""
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return lax.ragged_dot_general(x, weights, group_sizes, dimensions, precision=precision_of(x.dtype))


def grouped_matmul_tpu(x: Rows, weights: Weights, group_sizes: Sizes) -> Float[Array, "M outside"]:
    """`grouped_matmul_ragged` with a gradient of the weights that does only the rows' own work, where the kernel for that fits."""
    if grouped_tpu.why_not(x.shape[1], weights.shape[1], x.dtype) is not None:
        return grouped_matmul_ragged(x, weights, group_sizes)
    return jnp.asarray(_tpu(x, weights, group_sizes))


@jax.custom_vjp
def _tpu(x: Array, weights: Array, group_sizes: Array) -> Array:
    return grouped_matmul_ragged(x, weights, group_sizes)


def _tpu_forward(x: Array, weights: Array, group_sizes: Array):
    return grouped_matmul_ragged(x, weights, group_sizes), (x, weights, group_sizes)


def _tpu_backward(saved, gradient: Array):
    x, weights, group_sizes = saved
    _, to_rows = jax.vjp(lambda rows: grouped_matmul_ragged(rows, weights, group_sizes), x)
    like = grouped_tpu.result_shape(gradient, x, group_sizes)
    return to_rows(gradient)[0], trace_at_lowering(grouped_tpu.weight_gradient, gradient, x, group_sizes, like=like), None


_tpu.defvjp(_tpu_forward, _tpu_backward)


def grouped_matmul_blocked(x: Rows, weights: Weights, group_sizes: Sizes, spare_rows: int = 0) -> Float[Array, "M outside"]:
    """In blocks of one group's rows; forward, row gradient and weight gradient all do only the rows' own work."""
    return jnp.asarray(_blocked(x, weights, group_sizes, spare_rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(x: Array, weights: Array, group_sizes: Array, spare_rows: int) -> Array:
    return _multiply(x, weights, group_sizes, spare_rows, transpose=False)


def _forward(x: Array, weights: Array, group_sizes: Array, spare_rows: int):
    return _multiply(x, weights, group_sizes, spare_rows, transpose=False), (x, weights, group_sizes)


def _backward(spare_rows: int, saved, gradient: Array):
    x, weights, group_sizes = saved
    row_gradient = _multiply(gradient, weights, group_sizes, spare_rows, transpose=True)
    return row_gradient, _weight_gradient(x, gradient, group_sizes, spare_rows), None


_blocked.defvjp(_forward, _backward)


def grouped_matmul_cuda(x: Rows, weights: Weights, group_sizes: Sizes, spare_rows: int = 0) -> Float[Array, "M outside"]:
    """By kernels on an NVIDIA GPU, in float32 or where the kernels do not fit by the blocks; which, is decided at lowering.

    Lowering raises UserError in bfloat16 and float16 where the kernels would fit but tokamax is not installed.
    """
    return jnp.asarray(_cuda(x, weights, group_sizes, spare_rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cuda(x: Array, weights: Array, group_sizes: Array, spare_rows: int) -> Array:
    return _product_on_cuda("rows", x, weights, group_sizes, spare_rows)


def _cuda_forward(x: Array, weights: Array, group_sizes: Array, spare_rows: int):
    return _cuda(x, weights, group_sizes, spare_rows), (x, weights, group_sizes)


def _cuda_backward(spare_rows: int, saved, gradient: Array):
    x, weights, group_sizes = saved
    row_gradient = _product_on_cuda("row_gradient", gradient, weights, group_sizes, spare_rows)
    return row_gradient, _product_on_cuda("weight_gradient", gradient, x, group_sizes, spare_rows), None


_cuda.defvjp(_cuda_forward, _cuda_backward)


def _product_on_cuda(kind: grouped_cuda.Kind, left: Array, right: Array, group_sizes: Array, spare_rows: int) -> Array:
    product = functools.partial(_choose_on_cuda, kind, spare_rows)
    return trace_at_lowering(product, left, right, group_sizes, like=grouped_cuda.result_shape(kind, left, right, group_sizes))


def _choose_on_cuda(kind: grouped_cuda.Kind, spare_rows: int, left: Array, right: Array, group_sizes: Array) -> Array:
    outside, inside = (left.shape[1], right.shape[1]) if kind == "weight_gradient" else right.shape[1:]
    reason = grouped_cuda.why_not(inside, outside, left.dtype)
    if reason is None:
        return grouped_cuda.multiply(kind, left, right, group_sizes)
    say_once(f"grouped matmul on the GPU: a loop over blocks of rows, not tokamax's kernels; {reason}")
    if kind == "weight_gradient":
        return _weight_gradient(right, left, group_sizes, spare_rows)
    return _multiply(left, right, group_sizes, spare_rows, transpose=kind == "row_gradient")


def over_blocks(start: Array, size: Array, num_rows: int, body: Callable, carry):
    """Folds `body(first row, number of rows, carry)` over a group's rows: largest blocks, then the smallest that holds the rest.

    The last block reaches less than SPARE_ROWS rows past the group, so callers have that many behind their rows.
    """
    largest = BLOCK_ROWS[-1]
    count = jnp.zeros_like(size)
    if largest <= num_rows:
        count = size // largest
        carry = lax.fori_loop(0, count, lambda i, c: body(start + i * largest, largest, c), carry)
    first, rest, smaller = start + count * largest, size - count * largest, 0
    for rows in BLOCK_ROWS:
        # A loop of no turn or one, not a branch: XLA copies what a branch carries. The place depends on the turn, lest the
        # compiler take the work out of the loop and do it in any case.
        turns = ((rest > smaller) & (rest <= rows)).astype(jnp.int32)
        carry = lax.fori_loop(0, turns, lambda i, c, rows=rows: body(first + i * rows, rows, c), carry)
        smaller = rows
        if rows >= num_rows:
            break
    return carry


def pad_rows(rows: Array, spare_rows: int) -> Array:
    """The rows with SPARE_ROWS behind the last group, `spare_rows` of which are there already."""
    return rows if spare_rows >= SPARE_ROWS else jnp.pad(rows, ((0, SPARE_ROWS - spare_rows), (0, 0)))


def group_starts(group_sizes: Array) -> Array:
    """The first row of each group."""
    return (jnp.cumsum(group_sizes) - group_sizes).astype(group_sizes.dtype)


@functools.partial(jax.jit, static_argnames=("spare_rows", "transpose"))
def _multiply(x: Array, weights: Array, group_sizes: Array, spare_rows: int, transpose: bool) -> Array:
    """Rows times their group's weight, W x or (transpose) Wᵀ x.

    A group's last block may write into the next group's rows; groups go in order, so those rows are written again, rightly.
    """
    num_rows, (_, outside, inside) = x.shape[0], weights.shape
    padded = pad_rows(x, spare_rows)
    contract = (((1,), (0 if transpose else 1,)), ((), ()))

    def group(out, inputs):
        weight, start, size = inputs

        def block(first, count, out):
            rows = lax.dynamic_slice_in_dim(padded, first, count, 0)
            result = lax.dot_general(rows, weight, contract, precision=precision_of(x.dtype))
            return lax.dynamic_update_slice_in_dim(out, result, first, 0)

        return over_blocks(start, size, padded.shape[0] - SPARE_ROWS, block, out), None

    out = jnp.zeros((padded.shape[0], inside if transpose else outside), x.dtype)
    out, _ = lax.scan(group, out, (weights, group_starts(group_sizes), group_sizes))
    return out[:num_rows]


@functools.partial(jax.jit, static_argnames="spare_rows")
def _weight_gradient(x: Array, gradient: Array, group_sizes: Array, spare_rows: int) -> Array:
    """Sum over a group's rows of gradient ⊗ x, for every group: [E, out, in]; zeros for a group without rows."""
    padded_x, padded_gradient = pad_rows(x, spare_rows), pad_rows(gradient, spare_rows)
    shape = (gradient.shape[1], x.shape[1])

    def group(carry, inputs):
        start, size = inputs

        def block(first, count, total):
            mine = (first + jnp.arange(count) < start + size)[:, None]  # a tail block reaches into the next group's rows
            left = jnp.where(mine, lax.dynamic_slice_in_dim(padded_gradient, first, count, 0), 0)
            right = lax.dynamic_slice_in_dim(padded_x, first, count, 0)
            outer = lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=precision_of(x.dtype))
            return total + outer

        return carry, over_blocks(start, size, padded_x.shape[0] - SPARE_ROWS, block, jnp.zeros(shape, x.dtype))

    return lax.scan(group, None, (group_starts(group_sizes), group_sizes))[1]
