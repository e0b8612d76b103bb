"""The plan of a run: its real training step compiled for devices that need not be here, and what it will need there.

Weights are never made. Memory is the compiler's own plan, time a model of its schedule (`moejax.planning`).
"""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moejax.compiler_options import options_for
from moejax.config import RunConfig, UserError
from moejax.data.rows import Batch
from moejax.families.counts import count_parameters
from moejax.families.flops import count_flops
from moejax.model.expert_dispatch import choose_dispatch
from moejax.model.transformer import Transformer
from moejax.planning.compiled import (
    ASSUMPTIONS,
    Compiled,
    compile_program,
    describe_chip,
    describe_collectives,
    memory_of,
)
from moejax.planning.program import Computation, Program
from moejax.planning.topology import Topology
from moejax.sharding import MESH_AXES, check_mesh, make_mesh, partition_spec
from moejax.training.placement import part_bytes
from moejax.training.state import abstract_state, create_optimizer
from moejax.training.step import step_options, train_step

KEPT_KINDS = ("params", "optimizer_state")


def plan_run(config: RunConfig, topology: Topology, compare_sequential: bool = True) -> dict[str, Any]:
    """Everything that is known of a run's step on the topology, as JSON values; docs/plans/README.md says what each key means.

    With `compare_sequential`, a model whose experts run beside a dense residual is compiled once more with the one behind the other; one
    without has that wiring anyhow. Raises UserError for a mesh that the model or the devices do not allow, before anything is compiled.
    """
    mesh = plan_mesh(config, topology)
    compiled = compile_step(config, mesh, topology)
    result = describe_plan(config, mesh, topology, compiled)
    beside = compiled
    if compare_sequential and config.model.residual_mlp and compiled.fits:
        sequential = dataclasses.replace(config.model, residual_order="sequential")
        beside = compile_step(dataclasses.replace(config, model=sequential), mesh, topology)
        result["compile_seconds"] += beside.compile_seconds
    if beside is not compiled or not config.model.residual_mlp:
        for direction in ("forward", "backward"):
            result[f"sequential_hidden_all_to_all_{direction}"] = beside.timeline.hidden_exchange(direction)
        result["sequential_predicted_step_seconds"] = _predicted(beside, topology)
    return result


def plan_mesh(config: RunConfig, topology: Topology) -> Mesh:
    """The run's mesh over the topology's devices. Raises UserError where the two, or mesh and model, do not fit each other."""
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    if topology.slices > 1 and sizes["data"] == 1:
        sizes["data"] = topology.slices  # the only axis that may run across slices
    mesh = make_mesh(**sizes, devices=list(topology.devices))
    check_mesh(config.model, mesh)
    return mesh


def compile_step(config: RunConfig, mesh: Mesh, topology: Topology) -> Compiled:
    """The run's training step, compiled with the options that train.py compiles it with."""
    model, optimizer = Transformer(config.model, mesh), create_optimizer(config.train, config.steps)
    batch = abstract_batch(mesh, (config.train.batch_size, config.data.sequence_length))
    lowered = train_step.lower(model, optimizer, abstract_state(model, optimizer), batch, step_options(config.train))
    options = options_for(mesh.devices.flat[0].platform, config.train.compiler_options)
    return compile_program(lowered, mesh, topology, options, filled_rows(config, mesh))


def filled_rows(config: RunConfig, mesh: Mesh) -> float:
    """Share of the rows of an expert's matmuls that hold tokens, where all experts get as many."""
    shape = (config.train.batch_size // config.train.accumulation_steps, config.data.sequence_length, config.model.hidden_size)
    if choose_dispatch(config.model, mesh, shape) != "ragged":
        return 1.0
    factor = config.model.ragged_buffer_factor
    return 1.0 / (mesh.shape["expert"] if factor is None else max(factor, 1.0))


def abstract_batch(mesh: Mesh, shape: tuple[int, int]) -> Batch:
    """Shapes and shardings of one batch of `shape` rows and tokens."""
    sharding = NamedSharding(mesh, partition_spec(("batch", "time"), shape, mesh))
    integers, weights = (jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for kind in (jnp.int32, jnp.float32))
    return Batch(*(weights if name == "weights" else integers for name in Batch._fields))  # pyright: ignore[reportArgumentType]


def state_bytes(config: RunConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes of one device's part of the state, exactly: parameters, and what the optimiser keeps. Nothing is compiled."""
    model, optimizer = Transformer(config.model, mesh), create_optimizer(config.train, config.steps)
    state = abstract_state(model, optimizer)
    return {"parameters": part_bytes(state.params), "optimizer": part_bytes(state.optimizer_state)}


def kept_bytes(program: Program | None, layers: int) -> int:
    """Bytes of activations that the layers' loop keeps for the backward pass: what it fills layer by layer. 0 where layers stand apart."""
    return _kept_in(program, program.computations[program.entry], layers) if program is not None else 0


def _kept_in(program: Program, computation: Computation, layers: int) -> int:
    for one in computation.instructions:
        if one.opcode != "while":
            continue
        body = next(called for called in program.called_by(one) if called.root.opcode == "tuple")
        if program.trips(one) != layers:  # as the loop over the parts of a batch, which has those of the layers inside
            inside = _kept_in(program, body, layers)
            if inside:
                return inside
            continue
        untouched = set()
        for place, name in enumerate(body.root.operands):
            made = body.by_name[name]
            if made.opcode == "get-tuple-element" and made.number("index") == place:
                untouched.add(place)
        stacked = (shape for place, shape in enumerate(one.shapes) if place not in untouched and shape.sizes[:1] == (layers,))
        return sum(shape.bytes for shape in stacked)
    return 0


def _predicted(compiled: Compiled, topology: Topology) -> float | None:
    return compiled.timeline.seconds if compiled.fits and topology.chip is not None else None


def describe_plan(config: RunConfig, mesh: Mesh, topology: Topology, compiled: Compiled) -> dict[str, Any]:
    """A compiled step as JSON values."""
    rows, length, timeline = config.train.batch_size, config.data.sequence_length, compiled.timeline
    limit, devices, chip = memory_of(topology), mesh.size, topology.chip
    state, layers = state_bytes(config, mesh), config.model.num_layers // config.model.moe_every
    kept = kept_bytes(compiled.program, layers) if compiled.fits else 0
    model_flops, seconds = count_flops(config.model, rows, length), _predicted(compiled, topology)
    shape = (rows // config.train.accumulation_steps, length, config.model.hidden_size)
    return {
        "plan": "training step",
        "name": config.name,
        "topology": topology.name,
        "devices": devices,
        "chip": describe_chip(topology),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "dispatch": choose_dispatch(config.model, mesh, shape),
        "capacity_factor": config.model.capacity_factor,
        "remat": config.model.remat,
        "optimizer": config.train.optimizer,
        "batch_size": rows,
        "sequence_length": length,
        "accumulation_steps": config.train.accumulation_steps,
        "tokens_per_step": config.tokens_per_step,
        "parameters": count_parameters(config.model).total,
        "fits": compiled.fits,
        "hbm_bytes": limit,
        "hbm_bytes_left": None if limit is None else limit - compiled.needed_bytes,
        "bytes_per_device": {
            **state,
            "activations": kept,
            "temporaries": max(compiled.needed_bytes - sum(state.values()) - kept - compiled.program_bytes, 0),
            "program": compiled.program_bytes,
            "total": compiled.needed_bytes,
        },
        "flops": {
            "model": model_flops,  # causally, without what is computed again
            "program": timeline.flops * devices if compiled.fits else None,  # matmuls in the text, loops by their trips
            "compiler": compiled.compiler_flops,  # of one device, a loop's body once
        },
        "compute_seconds": timeline.compute_seconds,
        "flops_seconds": timeline.flops_seconds,
        "hbm_bytes_moved": timeline.hbm_bytes,
        "hbm_seconds": timeline.hbm_seconds,
        "link_seconds": timeline.link_seconds,
        "waiting_seconds": timeline.waiting_seconds,
        "predicted_step_seconds": seconds,
        "roofline_step_seconds": timeline.roofline_seconds if seconds else None,
        "predicted_tokens_per_second": config.tokens_per_step / seconds if seconds else None,
        "predicted_mfu": model_flops / (devices * chip.flops_per_second * seconds) if seconds and chip else None,
        "hidden_all_to_all_forward": timeline.hidden_exchange("forward"),
        "hidden_all_to_all_backward": timeline.hidden_exchange("backward"),
        "collectives": describe_collectives(timeline),
        "compiler_options": options_for(mesh.devices.flat[0].platform, config.train.compiler_options),
        "compile_seconds": compiled.compile_seconds,
        "assumptions": list(ASSUMPTIONS),
    }


def require_plannable(config: RunConfig, topology: Topology) -> None:
    """Raises UserError for what no plan can be made of, before anything is compiled."""
    mesh = plan_mesh(config, topology)
    across = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    rows = config.train.batch_size // config.train.accumulation_steps
    if rows % across:
        fitting = -(-rows // across) * across * config.train.accumulation_steps
        raise UserError(
            f"train.batch_size={config.train.batch_size} gives {rows} rows at a time, which mesh.data x fsdp x expert = {across} devices "
            f"do not divide; set --train.batch-size {fitting}, or more of --mesh.context or --mesh.tensor"
        )
