"""From tokens to their experts and back. Every kind keeps one contract and drops no token:

    apply_experts(x [M, D], Routing [M, A], ExpertWeights) -> y [M, D],  y = sum over a of weight_a * expert_a(x)

with expert(x) = down(silu(gate x) * up x). `dense` is the reference; `sorted` does only the chosen experts' work.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.ops.dispatch_few import FEW_ROWS, FEW_ROWS_TPU, apply_experts_few, apply_experts_together
from moejax.ops.expert_mlp import ExpertWeights, expert_mlp
from moejax.ops.grouped import count_spare_rows
from moejax.ops.matmul import as_output_major, precision_of
from moejax.ops.routing import Routing
from moejax.ops.rows import combine_rows, count_groups, sort_groups, take_rows


def apply_experts(
    x: Float[Array, "M D"], routing: Routing, weights: ExpertWeights, kind: Literal["sorted", "dense"]
) -> Float[Array, "M D"]:
    """Runs every row through its experts by the dispatch called `kind`; raises ValueError for a name it does not know."""
    if kind == "sorted":
        return apply_experts_chosen(x, routing, weights)
    if kind == "dense":
        return apply_experts_dense(x, routing, weights)
    raise ValueError(f"unknown dispatch {kind!r}; expected 'sorted' or 'dense'")


def apply_experts_dense(x: Float[Array, "M D"], routing: Routing, weights: ExpertWeights) -> Float[Array, "M D"]:
    """Every expert on every row, then the weighted sum: the slow reference."""
    weights = as_output_major(weights)
    precision = precision_of(x.dtype)
    gate = jnp.einsum("md,efd->emf", x, weights.gate, precision=precision)
    up = jnp.einsum("md,efd->emf", x, weights.up, precision=precision)
    outputs = jnp.einsum("emf,edf->emd", jax.nn.silu(gate) * up, weights.down, precision=precision)
    chosen = routing.experts[:, :, None] == jnp.arange(weights.gate.shape[0])[None, None, :]
    share = jnp.sum(jnp.where(chosen, routing.weights[:, :, None], 0.0), axis=1)
    return jnp.einsum("me,emd->md", share, outputs.astype(jnp.float32), precision=precision_of(jnp.float32)).astype(x.dtype)


def apply_experts_chosen(x: Float[Array, "M D"], routing: Routing, weights: ExpertWeights) -> Float[Array, "M D"]:
    """Sorted; for few rows on CPU the experts that are touched, one after another, and on TPUs all of them together."""
    ways: dict[str, Callable[..., Array]] = {}
    if x.shape[0] <= FEW_ROWS:
        ways["cpu"] = functools.partial(apply_experts_few, differentiable=apply_experts_sorted)
    if x.shape[0] <= FEW_ROWS_TPU:
        ways["tpu"] = apply_experts_together
    return lax.platform_dependent(x, routing, weights, default=apply_experts_sorted, **ways)


def apply_experts_sorted(x: Float[Array, "M D"], routing: Routing, weights: ExpertWeights) -> Float[Array, "M D"]:
    """Rows copied once per chosen expert and sorted by expert, the experts' MLPs, results brought back and summed."""
    order, place = sort_by_expert(routing.experts)
    group_sizes = count_groups(routing.experts.reshape(-1), weights.gate.shape[0])
    outputs = expert_mlp(spread_rows(x, order, place), weights, group_sizes, count_spare_rows(order.shape[0]))
    return combine_rows(routing.weights, outputs, place, _with_spare(order, order.shape[0]))


def sort_by_expert(experts: Int[Array, "M A"]) -> tuple[Int[Array, "MA"], Int[Array, "MA"]]:
    """(order, place): order[i] is the choice (row * A + rank) that stands i-th when sorted by expert; place undoes it."""
    return sort_groups(experts.reshape(-1))


# Behind the sorted rows stand spare ones of zeros (see ops.grouped): places that no choice has.


def _with_spare(index: Int[Array, "MA"], nothing: int) -> Int[Array, "sorted"]:
    return jnp.pad(index, (0, count_spare_rows(index.shape[0])), constant_values=nothing)


def spread_rows(x: Float[Array, "M D"], order: Int[Array, "MA"], place: Int[Array, "MA"]) -> Float[Array, "sorted D"]:
    """Row i of the result is the row of `x` that choice order[i] belongs to; then spare rows of zeros."""
    num_rows = x.shape[0]
    row = order // (order.shape[0] // num_rows)
    return jnp.asarray(take_rows(x, _with_spare(row, num_rows), place.reshape(num_rows, -1)))
