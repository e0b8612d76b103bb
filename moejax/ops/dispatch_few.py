"""Few rows, as in decoding: all of them through experts that only some of them chose. Nothing is sorted.

A matmul of a few rows waits for its weights, so rows that did not choose an expert cost next to nothing there. On CPU the experts that
any row chose run one after another, and no other expert's weights are read; the gradient is that of the sorted dispatch, which
`ops.dispatch` hands in. On TPUs all experts run in one batched matmul, which reads each weight once and where it lies: before the
kernel of a grouped matmul a layer's experts are copied out of the stack of all layers.
"""

from collections.abc import Callable

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float

from moejax.ops.expert_mlp import ExpertWeights
from moejax.ops.matmul import as_output_major, precision_of, project
from moejax.ops.routing import Routing

FEW_ROWS = 16  # of 8 experts, top-2: at 1 row 4.5 times as fast as sorted, at 8 rows 1.3 times, at 16 the same
# On TPUs. Up to 166 (v5p) to 560 (v6e) rows a weight takes longer to read than to multiply. Compiled for v5p, a layer of Arctic with 16
# experts on a device takes 0.46 ms for 64 rows so, and 1.20 ms through the kernels (by the compiler's estimates; not run).
FEW_ROWS_TPU = 128


def apply_experts_few(
    x: Float[Array, "M D"], routing: Routing, weights: ExpertWeights, differentiable: Callable[..., Array]
) -> Float[Array, "M D"]:
    """As every dispatch, y = sum over a of weight_a * expert_a(x), summed in the order of the experts; gradients are `differentiable`'s."""

    @jax.custom_vjp
    def apply(x: Array, weights: ExpertWeights, routing: Routing) -> Array:
        return _apply(x, weights, routing)

    def forward(x: Array, weights: ExpertWeights, routing: Routing):
        return jax.vjp(lambda x, weights, chosen: differentiable(x, Routing(chosen, routing.experts), weights), x, weights, routing.weights)

    def backward(pull, gradient: Array):
        of_x, of_weights, of_chosen = pull(gradient)
        return of_x, of_weights, Routing(of_chosen, None)  # pyright: ignore[reportArgumentType]

    apply.defvjp(forward, backward)
    return jnp.asarray(apply(x, weights, routing))


def _apply(x: Array, weights: ExpertWeights, routing: Routing) -> Array:
    experts = jnp.arange(weights.gate.shape[0])
    chosen = routing.experts[:, :, None] == experts[None, None, :]
    share = jnp.sum(jnp.where(chosen, routing.weights[:, :, None].astype(jnp.float32), 0.0), axis=1)  # [M, E]
    touched = jnp.any(chosen, axis=(0, 1))
    order = jnp.argsort(~touched, stable=True)

    def add_expert(turn: Array, total: Array) -> Array:
        expert = order[turn]
        gate, up, down = jax.tree.map(lambda weight: lax.dynamic_index_in_dim(weight, expert, 0, keepdims=False), weights)
        out = project(jax.nn.silu(project(x, gate)) * project(x, up), down)
        mine = lax.dynamic_slice_in_dim(share, expert, 1, 1)
        # What an expert makes of rows that are not its own may be infinite, and is not looked at.
        return total + jnp.where(mine != 0.0, out.astype(jnp.float32) * mine, 0.0)

    return lax.fori_loop(0, jnp.sum(touched), add_expert, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def apply_experts_together(x: Float[Array, "M D"], routing: Routing, weights: ExpertWeights) -> Float[Array, "M D"]:
    """As every dispatch, summed in the order of the experts; choices of experts outside of 0..E-1 add nothing."""
    weights = as_output_major(weights)
    chosen = routing.experts[:, :, None] == jnp.arange(weights.gate.shape[0])[None, None, :]
    share = jnp.sum(jnp.where(chosen, routing.weights[:, :, None].astype(jnp.float32), 0.0), axis=1).T[:, :, None]  # [E, M, 1]
    precision = precision_of(x.dtype)
    gate, up = (jnp.einsum("md,efd->emf", x, weight, precision=precision) for weight in (weights.gate, weights.up))
    out = jnp.einsum("emf,edf->emd", jax.nn.silu(gate) * up, weights.down, precision=precision).astype(jnp.float32)
    return jnp.sum(jnp.where(share != 0.0, out * share, 0.0), axis=0).astype(x.dtype)
