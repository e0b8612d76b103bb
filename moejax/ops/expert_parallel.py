"""The experts' MLPs where the experts lie on several devices: what runs on each one, inside shard_map. One contract:

    (x [M, D], routing [M, A], weights of this device's experts, mesh axis) -> (y [M, D], dropped)

x and routing are the device's own rows; `routing.experts` counts over all experts, and E (one past the last) is no expert: its row is
left out. `weights` are the E / P experts of this device of P along `axis`, whole or, where their width is divided over another axis, the
part of it here: results are then partial sums. `dropped` counts choices that found no room, on this device.
"""

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.ops.capacity import Slots
from moejax.ops.dispatch_few import FEW_ROWS_TPU, apply_experts_together
from moejax.ops.exchange import exchange_rows, plan_exchange
from moejax.ops.expert_mlp import ExpertWeights, expert_mlp
from moejax.ops.grouped import count_spare_rows
from moejax.ops.matmul import precision_of
from moejax.ops.routing import Routing
from moejax.ops.rows import combine_rows, count_groups, invert, sort_groups, take_rows

Result = tuple[Float[Array, "M D"], Int[Array, ""]]


def apply_local(x: Float[Array, "M D"], routing: Routing, weights: ExpertWeights, first_expert: Array | int = 0) -> Float[Array, "M D"]:
    """The weighted sum over those of each row's experts that lie here: experts `first_expert` and the following."""
    here = Routing(routing.weights, routing.experts - first_expert)
    if x.shape[0] > FEW_ROWS_TPU:
        return _apply_sorted(x, here, weights)
    return lax.platform_dependent(x, here, weights, tpu=apply_experts_together, default=_apply_sorted)


def _apply_sorted(x: Array, routing: Routing, weights: ExpertWeights) -> Array:
    """`apply_local` by kernels; experts count from the first one here."""
    per_token, num_experts = routing.experts.shape[1], weights.gate.shape[0]
    local = routing.experts.reshape(-1)
    local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
    outputs, place = _run_sorted(x, local, weights, per_token)
    return combine_rows(routing.weights, outputs, place, invert(place, outputs.shape[0]))


def _run_sorted(x: Array, local: Int[Array, "N"], weights: ExpertWeights, per_row: int) -> tuple[Array, Array]:
    """(outputs sorted by expert, place of each choice among them): choice n is row n // per_row through expert local[n]; E is none."""
    count, num_experts = local.shape[0], weights.gate.shape[0]
    spare = count_spare_rows(count)
    order, place = sort_groups(local)
    group_sizes = count_groups(local, num_experts)
    inside = jnp.arange(count + spare) < jnp.sum(group_sizes)
    index = jnp.where(inside, jnp.pad(order, (0, spare)) // per_row, x.shape[0])
    place = jnp.where(local < num_experts, place, count + spare)
    rows = jnp.asarray(take_rows(x, index, place.reshape(-1, per_row)))
    outputs = expert_mlp(rows, weights, group_sizes, spare)
    return jnp.where(inside[:, None], outputs, 0), place  # what a grouped matmul leaves behind the last group is undefined


def apply_gathered(x: Float[Array, "M D"], routing: Routing, weights: ExpertWeights, axis: str) -> Result:
    """Every device sees the rows of all devices of the axis and runs its own experts on them; the sums go back. Drops nothing.

    Moves M rows from each device to each other twice, however few experts are chosen: for small axes, and for few rows.
    Holds P * M * A rows of width D, and what the experts make of them.
    """
    x, routing = lax.all_gather((x, routing), axis, tiled=True)
    partial = apply_local(x, routing, weights, lax.axis_index(axis) * weights.gate.shape[0])
    return lax.psum_scatter(partial, axis, tiled=True), jnp.int32(0)


def apply_ragged(
    x: Float[Array, "M D"],
    routing: Routing,
    weights: ExpertWeights,
    axis: str,
    buffer_factor: float | None = None,
    has_ragged: bool = False,
) -> Result:
    """Every choice's row goes to the device of its expert, and the result back: a row moves A times at most, whatever P.

    Each device has room for `buffer_factor` * M * A rows, what it would get from an even router times the factor; None is P, all
    there are, with which nothing is ever dropped. What finds no room is dropped: its weight is lost to its token, and it is counted.
    `has_ragged`: see `exchange_rows`; False works everywhere, and sends P times as much.
    """
    num_rows, per_token = routing.experts.shape
    count, num_devices, num_local = num_rows * per_token, lax.axis_size(axis), weights.gate.shape[0]
    num_experts = num_devices * num_local
    buffer_rows = count * num_devices if buffer_factor is None else min(max(int(-(-count * buffer_factor // 1)), 1), count * num_devices)
    choices = routing.experts.reshape(-1)
    order, place = sort_groups(choices)
    sizes = lax.all_gather(count_groups(choices, num_experts), axis).reshape(
        num_devices, num_devices, num_local
    )  # [sender, receiver, expert of the receiver]
    wanted = jnp.sum(sizes, axis=2)
    exchange, moved = plan_exchange(wanted, buffer_rows, axis)
    me = lax.axis_index(axis)

    rows = take_rows(x, order // per_token, place.reshape(-1, per_token))
    received = jnp.asarray(exchange_rows(rows, exchange, buffer_rows, axis, has_ragged))
    local = _experts_of_received(sizes[:, me], moved[:, me], buffer_rows)
    outputs, back = _run_sorted(received, local, weights, 1)
    outputs = take_rows(outputs, back, invert(back, outputs.shape[0])[:, None])
    outputs = jnp.asarray(exchange_rows(outputs, exchange.reversed(), count, axis, has_ragged))
    y = combine_rows(routing.weights, outputs, place, order)
    return y, jnp.sum(wanted[me] - moved[me]).astype(jnp.int32)


def _experts_of_received(sizes: Int[Array, "P local"], moved: Int[Array, "P"], buffer_rows: int) -> Int[Array, "R"]:
    """The expert, of those here, of each row of the buffer: senders one after another, sorted by expert each. E behind the last."""
    ends = jnp.minimum(jnp.cumsum(sizes, axis=1), moved[:, None])  # what did not fit were a sender's last rows
    first = jnp.cumsum(moved) - moved
    boundaries = (first[:, None] + ends).reshape(-1)
    index = jnp.searchsorted(boundaries, jnp.arange(buffer_rows), side="right")
    return jnp.where(index < boundaries.shape[0], index % sizes.shape[1], sizes.shape[1]).astype(jnp.int32)


def apply_slots(x: Float[Array, "M D"], slots: Slots, weights: ExpertWeights, axis: str | None) -> Result:
    """Rows by the slots of `ops.capacity`: buffers of one size travel in an all-to-all, experts run as one batched matmul.

    Holds E * capacity rows. `axis` None: all experts are here.
    """
    num_rows, per_token = slots.slot.shape
    num_local = weights.gate.shape[0]
    num_devices = 1 if axis is None else lax.axis_size(axis)
    capacity = slots.choice.shape[0] // (num_local * num_devices)
    row = jnp.where(slots.choice < num_rows * per_token, slots.choice // per_token, num_rows)
    buffer = take_rows(x, row, slots.slot).reshape(num_devices, num_local, capacity, -1)
    if axis is not None:
        buffer = lax.all_to_all(buffer, axis, 0, 0, tiled=True)  # [sender, expert here, slot, D]
    outputs = _batched_mlp(jnp.swapaxes(buffer, 0, 1).reshape(num_local, num_devices * capacity, -1), weights)
    outputs = jnp.swapaxes(outputs.reshape(num_local, num_devices, capacity, -1), 0, 1)
    if axis is not None:
        outputs = lax.all_to_all(outputs, axis, 0, 0, tiled=True)
    outputs = outputs.reshape(-1, x.shape[1])
    return combine_rows(slots.routing.weights, outputs, slots.slot.reshape(-1), slots.choice), slots.dropped


def _batched_mlp(x: Float[Array, "E C D"], weights: ExpertWeights) -> Float[Array, "E C D"]:
    precision = precision_of(x.dtype)
    gate = jnp.einsum("ecd,efd->ecf", x, weights.gate, precision=precision)
    up = jnp.einsum("ecd,efd->ecf", x, weights.up, precision=precision)
    return jnp.einsum("ecf,edf->ecd", jax.nn.silu(gate) * up, weights.down, precision=precision)
