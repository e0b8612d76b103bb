"""What serving a model takes on devices that need not be here: one call of prefill and one of decode, compiled and read, never run."""

import dataclasses
import math
import re
from typing import Any

from jax.sharding import Mesh

from moejax.cache_config import CacheConfig
from moejax.config import MeshConfig, ModelConfig, UserError
from moejax.model.expert_dispatch import choose_dispatch
from moejax.model.prefill import read_chunk
from moejax.model.transformer import Transformer
from moejax.planning.compiled import ASSUMPTIONS, Compiled, compile_program, describe_chip, describe_collectives, memory_of
from moejax.planning.timeline import Timeline, walk
from moejax.planning.topology import Topology
from moejax.serving.abstract import abstract_cache, abstract_variables, decode_inputs, prefill_inputs
from moejax.serving.decoding import STEPS, Asked, decode
from moejax.serving.plan_meshes import Load, choose_mesh, nearest_meshes, open_mesh, weigh_mesh

SERVING_ASSUMPTIONS = (
    f"decode: calls of {STEPS} tokens a row, so a token takes the loop's body and 1/{STEPS} of what stands before and behind the loop",
    "of branches that the data decides, the longest is taken: rows draw, and filter by top-k or top-p",
    "the weights of all experts of a device are read, touched or not: the program reads them so",
    "the bandwidth limit: every weight of a device (the embedding's left out; of experts those that tokens meet under uniform routing) and "
    "the keys and values of `context` tokens read once a token, at HBM's bandwidth",
    "the host's work between calls is left out, and so are prompts that come meanwhile",
)
_TRIES = 2  # meshes compiled to find one that fits


def plan_serving(
    config: ModelConfig, mesh_config: MeshConfig | None, topology: Topology, batch: int, context: int, chunk: int, cache: CacheConfig
) -> dict[str, Any]:
    """The plan as JSON values; bytes and FLOP are those of one device. `mesh_config` None: the candidate that reads least for a token.

    `prefill` is one call of `chunk` tokens for each of `batch` rows into a cache of `context` slots, `decode` one more token for each
    row behind `context` others. `predicted_seconds` of decode is a token's. Of a program that fits no device only the bytes are known;
    `nearest_mesh` then names the one that does. Rates are None for devices of which the chip table has none.
    Raises UserError for a mesh that devices or model do not fit, and for a batch, context or chunk below 1.
    """
    for name, size in (("batch", batch), ("context", context), ("chunk", chunk)):
        if size < 1:
            raise UserError(f"{name}={size} of a plan must be at least 1")
    config = dataclasses.replace(config, remat="none", scan_layers=True)
    hbm = memory_of(topology)
    chosen = choose_mesh(config, topology.devices, batch, context, cache, hbm) if mesh_config is None else mesh_config
    mesh = open_mesh(config, chosen, topology.devices)
    sizes = _Sizes(batch, context, min(chunk, context), cache)
    load = weigh_mesh(config, mesh, batch, context, cache)
    programs = _compile(config, mesh, topology, sizes)
    larger = max(programs.values(), key=lambda compiled: _held_bytes(compiled, load))
    parts = _divide_bytes(larger, load)
    fits = all(compiled.fits for compiled in programs.values()) and (hbm is None or parts["total"] <= hbm)
    result = {
        "plan": "serving",
        "topology": topology.name,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "mesh_chosen_here": mesh_config is None,
        "chip": describe_chip(topology),
        "batch": batch,
        "context": context,
        "chunk": sizes.chunk,
        "cache": dataclasses.asdict(cache),
        "dtype": config.dtype,
        "fits": fits,
        "hbm_bytes": hbm,
        "bytes_per_device": parts,
        "prefill": {"dispatch": _dispatch(config, mesh, batch, sizes.chunk)}
        | _describe_prefill(programs["prefill"], topology, batch * sizes.chunk),
        "decode": {"dispatch": _dispatch(config, mesh, batch, 1)} | _describe_decode(programs["decode"], mesh, topology, batch, load),
        "assumptions": [*ASSUMPTIONS, *SERVING_ASSUMPTIONS],
    }
    if not fits and hbm is not None:
        result["nearest_mesh"] = _find_nearest(config, mesh, topology, sizes, parts["total"] - load.held)
    return result


@dataclasses.dataclass(frozen=True)
class _Sizes:
    batch: int
    context: int
    chunk: int
    cache: CacheConfig


def _compile(config: ModelConfig, mesh: Mesh, topology: Topology, sizes: _Sizes) -> dict[str, Compiled]:
    """Both programs, with the options that serving compiles them with: none."""
    model = Transformer(config, mesh)
    variables = abstract_variables(config, mesh)
    held = abstract_cache(config, mesh, sizes.batch, sizes.context, sizes.cache)
    lowered = {
        "prefill": lambda: read_chunk.lower(model, False, False, *prefill_inputs(config, mesh, variables, held, sizes.batch, sizes.chunk)),
        "decode": lambda: decode.lower(model, Asked(), *decode_inputs(mesh, variables, held, sizes.batch)),
    }
    tokens = {"prefill": sizes.chunk, "decode": 1}
    return {
        name: compile_program(lower(), mesh, topology, {}, _filled(config, mesh, sizes.batch, tokens[name]))
        for name, lower in lowered.items()
    }


def _dispatch(config: ModelConfig, mesh: Mesh, batch: int, tokens: int) -> str:
    return choose_dispatch(config, mesh, (batch, tokens, config.hidden_size))


def _filled(config: ModelConfig, mesh: Mesh, batch: int, tokens: int) -> float:
    """Share of the rows of grouped matmuls that are there: those of all devices have room, and a device's own come."""
    if _dispatch(config, mesh, batch, tokens) == "ragged" and config.ragged_buffer_factor is not None:
        return 1.0 / max(config.ragged_buffer_factor, 1.0)
    return 1.0 / mesh.shape["expert"]


def _held_bytes(compiled: Compiled, load: Load) -> int:
    """What a device holds while the program runs: what it needs, and what it does not take of the weights, as prefill the head."""
    return compiled.needed_bytes + (max(load.held - compiled.argument_bytes, 0) if compiled.argument_bytes else 0)


def _divide_bytes(compiled: Compiled, load: Load) -> dict[str, Any]:
    """Bytes of a device by what they are of. `other`: what arguments take beside weights and cache, padding above all."""
    known = compiled.argument_bytes > 0  # else refused: only the sum is known
    total = _held_bytes(compiled, load)
    other = max(compiled.argument_bytes - load.held, 0) if known else 0
    program = compiled.program_bytes if known else 0
    return {
        "weights": load.weights,
        "cache": load.cache,
        "temporaries": max(total - load.held - other - program, 0),
        "program": program if known else None,
        "other": other if known else None,
        "total": total,
    }


def _describe_program(compiled: Compiled) -> dict[str, Any]:
    return {"compile_seconds": compiled.compile_seconds, "needed_bytes": compiled.needed_bytes, "fits": compiled.fits}


def _describe_timeline(timeline: Timeline, topology: Topology) -> dict[str, Any]:
    known = topology.chip is not None
    return {
        "flops": timeline.flops,
        "roofline_seconds": timeline.roofline_seconds if known else None,
        "hbm_bytes_moved": timeline.hbm_bytes,
        "link_seconds": timeline.link_seconds if known else None,
        "waiting_seconds": timeline.waiting_seconds if known else None,
        "collectives": describe_collectives(timeline),
    }


def _describe_prefill(compiled: Compiled, topology: Topology, tokens: int) -> dict[str, Any]:
    if compiled.program is None:
        return _describe_program(compiled)
    seconds = compiled.timeline.seconds if topology.chip is not None else None
    rates = {"predicted_seconds": seconds, "predicted_tokens_per_second": tokens / seconds if seconds else None}
    return _describe_program(compiled) | rates | _describe_timeline(compiled.timeline, topology)


def _describe_decode(compiled: Compiled, mesh: Mesh, topology: Topology, batch: int, load: Load) -> dict[str, Any]:
    result = _describe_program(compiled) | _limit(topology, batch, load)
    if compiled.program is None:
        return result
    step = walk(dataclasses.replace(compiled.program, entry=_loop_body(compiled)), mesh, topology)
    result |= {"predicted_seconds": None, "predicted_tokens_per_second": None, "fraction_of_bandwidth_limit": None}
    if topology.chip is not None:
        around = compiled.timeline.seconds - step.seconds
        seconds = step.seconds + around / STEPS
        rate = batch / seconds
        result |= {"predicted_seconds": seconds, "loop_body_seconds": step.seconds, "around_loop_seconds": around, "tokens_a_call": STEPS}
        result |= {"predicted_tokens_per_second": rate}
        result |= {"fraction_of_bandwidth_limit": rate / result["bandwidth_limit_tokens_per_second"]}
    return result | _describe_timeline(step, topology)


def _limit(topology: Topology, batch: int, load: Load) -> dict[str, Any]:
    """The tokens/s that HBM's bandwidth allows: as the mesh lays weights and cache out, and if nothing lay on two devices."""
    result: dict[str, Any] = {"bytes_to_read": {"weights": load.read_weights, "cache": load.read_cache, "total": load.read}}
    bandwidth = None if topology.chip is None else topology.chip.hbm_bytes_per_second
    result["bandwidth_limit_tokens_per_second"] = None if bandwidth is None else batch * bandwidth / load.read
    result["bandwidth_limit_nothing_twice_tokens_per_second"] = None if bandwidth is None else batch * bandwidth / load.spread
    return result


def _loop_body(compiled: Compiled) -> str:
    """The computation that makes one token: the body of the entry's loop that holds the layers' own."""
    program = compiled.program
    assert program is not None
    loops = [one for one in program.computations[program.entry].instructions if one.opcode == "while"]
    bodies = [found[1] for one in loops if (found := re.search(r"body=%?([\w.\-]+)", one.attributes))]
    return max(bodies, key=lambda name: len(program.computations[name].instructions))


def _find_nearest(config: ModelConfig, asked: Mesh, topology: Topology, sizes: _Sizes, beside: float) -> dict[str, Any]:
    """The nearest mesh that holds the model, compiled; else what the one that holds least is short of. `beside`: bytes that the asked
    mesh's program takes beside weights and cache."""
    hbm = memory_of(topology)
    assert hbm is not None
    near = nearest_meshes(config, asked, sizes.batch, sizes.context, sizes.cache, hbm - beside)
    near = near or nearest_meshes(config, asked, sizes.batch, sizes.context, sizes.cache, hbm)
    tried: dict[str, Any] = {"fits": False}
    for mesh_config, load in near[:_TRIES]:
        mesh = open_mesh(config, mesh_config, topology.devices)
        programs = _compile(config, mesh, topology, sizes).values()
        needed = max(_held_bytes(compiled, load) for compiled in programs)
        fits = needed <= hbm and all(compiled.fits for compiled in programs)
        shape = {axis: size for axis, size in mesh.shape.items() if size > 1}
        tried = {"mesh": shape, "fits": fits, "needed_bytes": needed, "weights_and_cache_bytes": load.held}
        if fits:
            return tried
    everything = nearest_meshes(config, asked, sizes.batch, sizes.context, sizes.cache, math.inf)
    return tried | {"least_weights_and_cache_bytes": min(load.held for _, load in everything)}
