"""Other meshes and remat policies for the same run and devices: which could be, which look best on paper, which one compiled fits."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from moejax.config import MeshConfig, RunConfig, UserError, divisors
from moejax.families.counts import count_parameters
from moejax.families.flops import count_flops
from moejax.planning.compiled import memory_of
from moejax.planning.topology import Topology
from moejax.training.plan import plan_mesh, plan_run, require_plannable

REMAT = ("none", "dots", "full")
LARGEST_CONTEXT = 4
KEPT_WIDTHS = {"full": 1.0, "dots": 8.0, "none": 30.0}  # of the model's width, kept of a row in each layer
MOMENT_BYTES = {"adamw": 8, "lion": 4, "muon": 4, "adafactor": 0}  # of a parameter


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run: the configuration, and what it needs by a rough count, without compiling."""

    config: RunConfig
    bytes: float
    seconds: float


def candidates(config: RunConfig, topology: Topology) -> list[Candidate]:
    """Ways to run that the model and the devices allow, quickest by the rough count first; those far too large left out."""
    limit, found = memory_of(topology), []
    for changed in _variations(config, len(topology.devices), topology.slices):
        try:
            require_plannable(changed, topology)
        except UserError:
            continue
        needed = estimate_bytes(changed, topology)
        if limit is None or needed < 1.3 * limit:  # the count is rough
            found.append(Candidate(changed, needed, estimate_seconds(changed, topology)))
    return sorted(found, key=lambda one: one.seconds)


def _variations(config: RunConfig, devices: int, slices: int) -> Iterator[RunConfig]:
    model, length = config.model, config.data.sequence_length
    for expert in (size for size in divisors(model.num_experts) if devices % size == 0):
        for tensor in (size for size in (1, 2, 4, 8) if math.gcd(model.num_heads, model.num_kv_heads) % size == 0):
            for context in (size for size in (1, 2, LARGEST_CONTEXT) if length % size == 0):
                if (devices // slices) % (expert * tensor * context):
                    continue
                mesh = MeshConfig(data=slices, fsdp=-1, expert=expert, context=context, tensor=tensor)
                for remat in REMAT:
                    yield dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(model, remat=remat))


def estimate_bytes(config: RunConfig, topology: Topology) -> float:
    """Bytes of one device, roughly: parameters, moments, gradients, kept activations, and one layer at work."""
    sizes, model = plan_mesh(config, topology).shape, config.model
    kinds = count_parameters(model).by_kind
    experts = kinds["experts"].total / sizes["expert"] if "experts" in kinds else 0
    held = (experts + sum(kind.total for name, kind in kinds.items() if name != "experts")) / (sizes["fsdp"] * sizes["tensor"])
    item, stored = (4 if kind == "float32" else 2 for kind in (model.dtype, model.param_dtype))
    rows = config.train.batch_size / config.train.accumulation_steps * config.data.sequence_length
    rows /= math.prod(sizes.values()) / sizes["tensor"]
    kept = rows * model.hidden_size * item * model.num_layers * KEPT_WIDTHS[model.remat]
    layer = sum(kind.total for name, kind in kinds.items() if name != "embedding") / model.num_layers
    gathered = 3 * item * layer / (sizes["expert"] * sizes["tensor"])
    working = 20 * rows * model.hidden_size * item
    return held * (2 * stored + MOMENT_BYTES[config.train.optimizer]) + kept + gathered + working


def estimate_seconds(config: RunConfig, topology: Topology) -> float:
    """Seconds of a step, roughly: FLOP at three quarters of the peak, and a third of what the links carry, as if that were not hidden."""
    if topology.chip is None:
        return 0.0
    mesh, model, chip = plan_mesh(config, topology), config.model, topology.chip
    rows, length = config.train.batch_size, config.data.sequence_length
    again = {"none": 1.0, "dots": 1.05, "full": 4 / 3}[model.remat]
    compute = again * count_flops(model, rows, length) / mesh.size / (0.75 * chip.flops_per_second)
    kinds, link = count_parameters(model).by_kind, 2 * chip.link_bytes_per_second
    experts, others = kinds["experts"].total, sum(kind.total for name, kind in kinds.items() if name not in ("experts", "embedding"))
    share = mesh.shape["tensor"]
    gathers = 3 * config.train.accumulation_steps * 2 * (experts / mesh.shape["expert"] + others) / share
    gathers = gathers / link if mesh.shape["fsdp"] > 1 else 0.0
    tokens = rows * length / (mesh.size / share)
    exchanged = 6 * tokens * model.experts_per_token * model.hidden_size * 2 * model.num_layers if mesh.shape["expert"] > 1 else 0.0
    reduced = 8 * tokens * model.hidden_size * 2 * model.num_layers if share > 1 else 0.0
    gathered = 4 * tokens * model.hidden_size * 2 * model.num_layers if mesh.shape["context"] > 1 else 0.0
    across = max(mesh.shape["expert"] ** 0.5, 1.0) / 4
    return compute + (gathers + exchanged * across / link + (reduced + gathered) / link) / 3


def search(
    config: RunConfig, topology: Topology, seconds: float, tell: Callable[[str], None] = lambda line: None
) -> tuple[list[dict[str, Any]], int]:
    """(plans made within the time, quickest first, `on_frontier` set; how many candidates were left). The run's own comes first.

    A plan that has begun is finished; none is begun that would end past the time if it took as long as the longest before.
    """
    started, longest, rows = time.perf_counter(), 0.0, []
    own = [Candidate(config, 0.0, 0.0)]
    waiting = own + [one for one in candidates(config, topology) if not _alike(one.config, config, topology)]
    while waiting and time.perf_counter() - started + longest < seconds:
        candidate = waiting.pop(0)
        began = time.perf_counter()
        result = plan_run(candidate.config, topology, compare_sequential=False)
        longest = max(longest, time.perf_counter() - began)
        rows.append(result)
        took = f"{result['predicted_step_seconds']:.3f} s" if result["predicted_step_seconds"] else "does not fit"
        tell(f"{len(rows)}: {result['mesh']}, remat {result['remat']}: {took} ({longest:.0f} s to compile at most, {len(waiting)} waiting)")
    mark_frontier(rows)
    rows.sort(key=lambda row: row["predicted_step_seconds"] or math.inf)
    return rows, len(waiting)


def _alike(one: RunConfig, other: RunConfig, topology: Topology) -> bool:
    same_mesh = plan_mesh(one, topology).shape == plan_mesh(other, topology).shape
    return same_mesh and one.model == other.model and one.train == other.train


def mark_frontier(rows: list[dict[str, Any]]) -> None:
    """Sets `on_frontier` of each plan: it fits, and no other that fits is as quick in less memory, or quicker in as much."""
    for row in rows:
        mine = (row["predicted_step_seconds"], row["bytes_per_device"]["total"])
        others = [
            (other["predicted_step_seconds"], other["bytes_per_device"]["total"]) for other in rows if other is not row and other["fits"]
        ]
        beaten = any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in others) if mine[0] else True
        row["on_frontier"] = row["fits"] and not beaten


def find_fitting(config: RunConfig, topology: Topology, seconds: float) -> dict[str, Any] | None:
    """The plan nearest to the run's that fits: fewest changes first, then the least memory by the rough count. None where time ran out."""
    started, longest = time.perf_counter(), 0.0
    halved = []
    for parts in (2, 4, 8):
        if config.train.batch_size % (config.train.accumulation_steps * parts) == 0:
            train = dataclasses.replace(config.train, accumulation_steps=config.train.accumulation_steps * parts)
            halved.append(dataclasses.replace(config, train=train))
    limit = memory_of(topology) or math.inf
    options = [(_changes(one.config, config, topology), one.bytes, one.config) for one in candidates(config, topology)]
    options += [(1, estimate_bytes(one, topology), one) for one in halved if _is_plannable(one, topology)]
    options = [option for option in options if option[0] and option[1] < limit]
    for _, _, option in sorted(options, key=lambda option: option[:2]):
        if time.perf_counter() - started + longest > seconds:
            return None
        began = time.perf_counter()
        result = plan_run(option, topology, compare_sequential=False)
        longest = max(longest, time.perf_counter() - began)
        if result["fits"]:
            return result
    return None


def _is_plannable(config: RunConfig, topology: Topology) -> bool:
    try:
        require_plannable(config, topology)
    except UserError:
        return False
    return True


def _changes(one: RunConfig, other: RunConfig, topology: Topology) -> int:
    """How many choices differ: remat, and each axis of the mesh but fsdp, which takes what is left."""
    ours, theirs = plan_mesh(one, topology).shape, plan_mesh(other, topology).shape
    return (one.model.remat != other.model.remat) + sum(ours[axis] != theirs[axis] for axis in ours if axis != "fsdp")
