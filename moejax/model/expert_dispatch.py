"""How tokens reach their experts, on one device or on a mesh: what `ModelConfig.dispatch` names.

On one device, and where `mesh.expert` is 1, a device's rows meet all experts:
    sorted    rows sorted by expert, one grouped matmul            dense     every expert on every row, the slow reference
    capacity  slots of a fixed number per expert; DeepSpeed's gates; drops what finds none
and where experts lie on several devices:
    gather    every device gets all rows of its expert group       ragged    a row goes to the devices of its experts
    capacity  as above, slots counted per device, buffers of one size exchanged
auto is sorted, gather or ragged, whichever moves the fewest bytes. Only capacity, and ragged with a smaller buffer, can drop.
"""

import functools
from typing import Any, Literal, cast

import flax.struct
import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float

from moejax.config import ModelConfig
from moejax.ops import expert_parallel
from moejax.ops.capacity import assign_slots, choose_experts, expert_capacity
from moejax.ops.dispatch import apply_experts
from moejax.ops.expert_mlp import ExpertWeights
from moejax.ops.platforms import say_once
from moejax.ops.routing import Routing, route
from moejax.sharding import axis_size, partition_spec

FEW_ROWS = 8  # per device: moving them is then a matter of latency, and one gather is one message

# "Ragged all-to-all is currently not supported in limited ICI routing settings", says their compiler.
WITHOUT_RAGGED = ("TPU v5 lite", "TPU v5e")

GATE_AXES = ("expert", "mlp", "embed")
DOWN_AXES = ("expert", "embed", "mlp")


@flax.struct.dataclass
class TokenInputs:
    """What routing needs to know of the tokens; None where there is nothing to know.

    counts: which tokens enter the router's averages. fill: rows that only fill up the mesh and meet no expert. noise: Gumbel noise for the
    second choice, or, with one expert a token, the priority for slots; for dispatch capacity alone.
    """

    counts: Bool[Array, "B T"] | None = None
    fill: Bool[Array, "B T"] | None = None
    noise: Float[Array, "B T E"] | None = None


def reach_experts(
    config: ModelConfig,
    mesh: Mesh | None,
    x: Float[Array, "B T D"],
    logits: Float[Array, "B T E"],
    bias: Float[Array, "E"] | None,
    weights: ExpertWeights,
    inputs: TokenInputs,
) -> tuple[Float[Array, "B T D"], Routing, Array]:
    """(weighted sums of the experts' outputs, the routing [B, T, A], choices dropped); `bias` is added to the choice of experts alone."""
    has_ragged = mesh is not None and has_ragged_exchange(mesh)
    run = functools.partial(_run, config, choose_dispatch(config, mesh, x.shape), has_ragged)
    if mesh is None:
        return run(None, x, logits, bias, weights, inputs)
    return _on_mesh(run, mesh, x, logits, bias, weights, inputs)


def _run(
    config: ModelConfig,
    kind: str,
    has_ragged: bool,
    axis: str | None,
    x: Array,
    logits: Array,
    bias: Array | None,
    weights: ExpertWeights,
    inputs: TokenInputs,
) -> tuple[Array, Routing, Array]:
    """`reach_experts` with the rows and the experts of one device; `axis` is that of the experts, None where all are here."""
    per_token, shape = config.experts_per_token, x.shape
    x, logits = x.reshape(-1, shape[-1]), logits.reshape(-1, config.num_experts)
    dropped = jnp.zeros((), jnp.int32)
    if kind == "capacity":
        noise = None if inputs.noise is None else inputs.noise.reshape(-1, config.num_experts)
        rows = x.shape[0]
        capacity = expert_capacity(rows, config.num_experts, per_token, config.capacity_factor, config.min_capacity)
        chosen = choose_experts(logits, per_token, noise if per_token > 1 else None)
        chosen = _without(chosen, inputs.fill, config.num_experts)
        slots = assign_slots(chosen, config.num_experts, capacity if config.drop_tokens else rows, noise)
        routing = slots.routing
        out, dropped = expert_parallel.apply_slots(x, slots, weights, axis)
    else:
        routing = route(logits, per_token, config.top_1_weight, bias)
        taken = _without(routing, inputs.fill, config.num_experts)
        if kind == "replicated":
            out = lax.psum(expert_parallel.apply_local(x, taken, weights, lax.axis_index(axis) * weights.gate.shape[0]), axis)
        elif kind == "gather":
            out, dropped = expert_parallel.apply_gathered(x, taken, weights, str(axis))
        elif kind == "ragged":
            out, dropped = expert_parallel.apply_ragged(x, taken, weights, str(axis), config.ragged_buffer_factor, has_ragged)
        else:
            out = apply_experts(x, routing, weights, "dense" if kind == "dense" else "sorted")
    routing = Routing(*(part.reshape(*shape[:-1], per_token) for part in routing))
    return out.reshape(shape), routing, dropped


def _without(routing: Routing, fill: Array | None, num_experts: int) -> Routing:
    """The routing with no expert for rows that only fill up the mesh."""
    if fill is None:
        return routing
    return Routing(routing.weights, jnp.where(fill.reshape(-1, 1), num_experts, routing.experts))


def _on_mesh(run, mesh: Mesh, x: Array, logits: Array, bias: Array | None, weights: ExpertWeights, inputs: TokenInputs):
    """`run` on every device's own rows; the experts' weights arrive whole but for the experts and the width that lie elsewhere."""
    tensor = mesh.shape["tensor"]
    missing = -weights.gate.shape[1] % tensor
    if missing:  # a width that does not divide: columns of zeros add nothing
        gate, up = (jnp.pad(weight, ((0, 0), (0, missing), (0, 0))) for weight in (weights.gate, weights.up))
        weights = ExpertWeights(gate, up, jnp.pad(weights.down, ((0, 0), (0, 0), (0, missing))))
    rows = partition_spec(("batch", "time", None), x.shape, mesh)
    spread = tuple(axis for part in rows for axis in ((part,) if isinstance(part, str) else part or ()))
    specs = ExpertWeights(
        *(
            cast(Any, partition_spec(names, weight.shape, mesh))
            for names, weight in zip((GATE_AXES, GATE_AXES, DOWN_AXES), weights, strict=True)
        )
    )
    expert_axis = "expert" if mesh.shape["expert"] > 1 else None

    def body(x: Array, logits: Array, bias: Array | None, weights: ExpertWeights, parts: tuple[Array | None, ...]):
        gathered = ExpertWeights(*(_gather_embed(weight, cast(Any, spec)) for weight, spec in zip(weights, specs, strict=True)))
        out, routing, dropped = run(expert_axis, x, logits, bias, gathered, TokenInputs(*parts))
        if tensor > 1:
            out = lax.psum(out, "tensor")
        return out, routing, lax.psum(dropped, spread) if spread else dropped

    token = PartitionSpec(*rows[:2])
    parts = (inputs.counts, inputs.fill, inputs.noise)
    part_specs = tuple(None if part is None else (token if part.ndim == 2 else rows) for part in parts)
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(rows, rows, None if bias is None else PartitionSpec(), specs, part_specs),
        out_specs=(rows, rows, PartitionSpec()),
        check_vma=False,
    )
    return mapped(x, logits, bias, weights, parts)


def _gather_embed(weight: Array, spec: PartitionSpec) -> Array:
    """The weight with its model width whole: that is divided at rest (`fsdp`) only to save memory."""
    for dimension, part in enumerate(spec):
        if part == "fsdp":
            weight = lax.all_gather(weight, "fsdp", axis=dimension, tiled=True)
    return weight


def has_ragged_exchange(mesh: Mesh) -> bool:
    """Whether rows can go to other devices of the mesh in parts of any length. XLA cannot on CPUs, nor on TPU v5e."""
    device = mesh.devices.flat[0]
    return device.platform != "cpu" and device.device_kind not in WITHOUT_RAGGED


def choose_dispatch(config: ModelConfig, mesh: Mesh | None, shape: tuple[int, ...]) -> str:
    """The kind that runs on x of this shape: what the config names, or what moves the fewest bytes; says which and why, once a case.

    Rows that are too few to be divided lie on every device; each runs its experts on all of them, and the results are summed.
    """
    kind, experts = config.dispatch, axis_size(mesh, "expert")
    if mesh is None or experts == 1:
        return "sorted" if kind in ("auto", "gather", "ragged") else kind
    if kind == "capacity":
        return kind
    spread = partition_spec(("batch", "time", None), shape, mesh)
    if spread[0] is None:
        return "replicated"
    if kind == "ragged" and not has_ragged_exchange(mesh) and mesh.devices.flat[0].platform != "cpu":
        say_once(
            f"dispatch ragged: these devices have no ragged all-to-all, blocks of one size travel, {experts} times the rows; see gather"
        )
    if kind != "auto":
        return kind
    rows = shape[0] * shape[1] // axis_size(mesh, "data", "fsdp", "expert", "context")
    return _choose(experts, rows, config.experts_per_token, config.hidden_size, has_ragged_exchange(mesh))


def _choose(experts: int, rows: int, per_token: int, size: int, has_ragged: bool) -> Literal["gather", "ragged"]:
    gathered, ragged = (experts - 1) * rows * size * 2, rows * per_token * size * 2 * (experts - 1) // experts
    if rows <= FEW_ROWS:
        kind, why = "gather", f"{rows} rows a device are one message"
    elif not has_ragged:
        kind, why = "gather", "XLA has no ragged all-to-all on these devices, and its stand-in moves more"
    elif gathered <= ragged:
        kind, why = "gather", f"it moves {gathered:,} elements a device and layer, ragged {ragged:,}"
    else:
        kind, why = "ragged", f"it moves {ragged:,} elements a device and layer, gather {gathered:,}"
    say_once(f"dispatch auto: {kind} over mesh.expert={experts}, as {why}")
    return kind
