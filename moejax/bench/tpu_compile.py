"""A training step compiled for eight TPU devices where there is none, and its program looked through: compiled, not run.

For each way of reaching the experts, loss, gradients and AdamW on a mesh. A program must not talk to the host, must have the collective
it was written for, must never gather the experts of other devices, must not be partitioned by copying an array whole, and must take
from each device the part of the weights that the mesh says.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.bench import PROGRAM
from moejax.config import ModelConfig, TrainConfig, UserError
from moejax.planning.messages import captured_stderr
from moejax.planning.topology import tpu_devices
from moejax.results import deliver, describe_machine, require_place

# Of all sizes here only the experts' width has a factor 5: an array with that factor is made of their weights.
SHAPE = ModelConfig(
    vocab_size=1024, hidden_size=512, intermediate_size=640, num_layers=2, num_heads=8, num_kv_heads=8, head_size=64, num_experts=8,
    max_length=1024, dtype="bfloat16", remat="full",
)  # fmt: skip
BATCH = (16, 384)  # no other size here is 384: an array with that twice is made of all scores of a row
WIDTH_FACTOR = 5
NUM_DEVICES = 8
ATTENTION_KERNEL = "splash_mha_fwd"
LARGEST_PADDING = 1.15  # bytes of the arguments over those of their entries: a TPU lays arrays out in tiles


@dataclass(frozen=True)
class Program:
    """One training step: how tokens reach their experts, on which mesh, and the collectives that this takes."""

    dispatch: str
    mesh: dict[str, int]
    expected: tuple[str, ...]


PROGRAMS = {
    "capacity": Program("capacity", {"expert": 4, "fsdp": 2}, ("all-to-all", "all-gather")),
    "gather": Program("gather", {"expert": 4, "fsdp": 2}, ("all-gather", "reduce-scatter")),
    "ragged": Program("ragged", {"expert": 4, "fsdp": 2}, ("ragged-all-to-all", "all-gather")),
    "tensor": Program("auto", {"expert": 2, "context": 2, "tensor": 2, "fsdp": 1}, ("all-gather", "all-reduce")),
}

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"= (?P<result>\(*[a-z0-9]+\[.*?) (?P<name>[a-z-]+)\(")
_SHAPE = re.compile(r"[a-z0-9]+\[([0-9,]*)\]")
_HOST = re.compile(r"is_host_transfer=true|custom_call_target=\"[^\"]*(?:callback|MoveToHost|MoveToDevice)[^\"]*\"")
_COPIED_WHOLE = re.compile(r"involuntary full rematerialization", re.IGNORECASE)


@dataclass(frozen=True)
class Arguments:
    """Compiles training steps for TPUs that are not there."""

    topology: str = "v5p:2x2x2"  # eight devices of a kind that libtpu knows, as v5p:2x2x2, v5e:2x4 or v6e:2x4
    programs: tuple[str, ...] = tuple(PROGRAMS)
    json: str | None = None  # a file for the result; - prints only the JSON

    def __post_init__(self) -> None:
        for name in self.programs:
            if name not in PROGRAMS:
                raise UserError(f"programs has {name!r}; expected some of {', '.join(PROGRAMS)}")


def run(arguments: Arguments) -> None:
    """Compiles, checks and reports. Ends with exit status 1 where a check fails."""
    if arguments.json not in (None, "-"):
        require_place(str(arguments.json), "--json")
    devices = topology_devices(arguments.topology, NUM_DEVICES)
    results = {name: compile_program(PROGRAMS[name], devices) for name in arguments.programs}
    result = {"benchmark": "tpu_compile", "topology": arguments.topology, "programs": results, **describe_machine(PROGRAM)}
    deliver(result, _table(arguments.topology, results), arguments.json)
    if any(found["failures"] for found in results.values()):
        raise SystemExit(1)


def topology_devices(topology: str, count: int | None = None) -> list[Any]:
    """`tpu_devices`; raises UserError for another number of them than `count`, too."""
    devices = tpu_devices(topology)
    if count not in (None, len(devices)):
        raise UserError(
            f"topology {topology!r} has {len(devices)} devices, but the programs are for {count}; use one as v5p:2x2x2 or v6e:2x4"
        )
    return devices


def compile_program(program: Program, devices: list[Any]) -> dict[str, Any]:
    """Seconds, bytes a device, collectives in the program's text by kind, and `failures`: a line for each check that failed."""
    from moejax.model.transformer import Transformer
    from moejax.sharding import make_mesh
    from moejax.training.plan import abstract_batch
    from moejax.training.state import abstract_state, create_optimizer
    from moejax.training.step import train_step

    config, mesh = replace(SHAPE, dispatch=program.dispatch), make_mesh(**program.mesh, devices=devices)
    model, optimizer = Transformer(config, mesh), create_optimizer(TrainConfig())
    state = abstract_state(model, optimizer)
    with captured_stderr() as messages:
        started = time.perf_counter()
        compiled = train_step.lower(model, optimizer, state, abstract_batch(mesh, BATCH)).compile()
        seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None  # libtpu has it
    placed = compiled.input_shardings[0][0]
    sizes = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes_whole": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "state_bytes_per_device": _bytes_per_device(state, placed),
        "expert_parts": _expert_parts(state.params, placed.params),
    }
    host_bytes = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes + memory.host_temp_size_in_bytes
    failures = check_text(text, program, config) + check_sizes(sizes, mesh)
    failures += [f"{host_bytes} bytes lie in the host's memory"] if host_bytes else []
    failures += [line.strip() for line in "".join(messages).splitlines() if _COPIED_WHOLE.search(line)]
    return {"mesh": program.mesh, "compile_seconds": seconds, **sizes, "collectives": count_collectives(text), "failures": failures}


def _bytes_per_device(tree: Any, shardings: Any) -> int:
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


def _expert_parts(params: Any, shardings: Any) -> float:
    """In how many parts the experts' weights lie, by the shardings of the compiled program."""
    whole = held = 0
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True):
        if re.search(r"'moe'.*'(gate|up|down)'", jax.tree_util.keystr(path)):
            whole += math.prod(leaf.shape)
            held += math.prod(sharding.shard_shape(leaf.shape))
    return whole / held


def list_instructions(text: str) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """(name, shapes of the results) of every instruction of a program in XLA's text."""
    for line in text.splitlines():
        found = _INSTRUCTION.search(line)
        if found:
            yield found["name"], [tuple(int(size) for size in shape.split(",") if size) for shape in _SHAPE.findall(found["result"])]


def count_collectives(text: str) -> dict[str, int]:
    """How often the program's text names each collective; what stands in the loop over the layers counts once."""
    names = Counter(name.removesuffix("-start") for name, _ in list_instructions(text))
    return {name: names[name] for name in COLLECTIVES if names[name]}


def check_text(text: str, program: Program, config: ModelConfig) -> list[str]:
    """What is wrong with the program of a step, a line each."""
    failures = [f"the program talks to the host: {found.group()}" for found in _HOST.finditer(text)]
    present = count_collectives(text)
    failures += [f"there is no {name} in the program" for name in program.expected if name not in present]
    has_whole_rows = program.mesh.get("context", 1) == 1  # attention has no kernel for parts of rows
    if has_whole_rows and ATTENTION_KERNEL not in text:
        failures.append(f"there is no {ATTENTION_KERNEL} in the program")
    parts = program.mesh.get("expert", 1) * program.mesh.get("tensor", 1)
    most = config.num_experts * config.intermediate_size * config.hidden_size // parts
    for name, shapes in list_instructions(text):
        if name.removesuffix("-start").removesuffix("-done") in ("send", "recv", "infeed", "outfeed"):
            failures.append(f"the program has a {name}")
        scores = [shape for shape in shapes if len(shape) > 3 and shape.count(BATCH[1]) > 1] if has_whole_rows else []
        failures += [f"the program has all scores of a row, {list(shape)}" for shape in scores]
        if name.removesuffix("-start") != "all-gather":
            continue
        for shape in shapes:
            if math.prod(shape) % WIDTH_FACTOR == 0 and math.prod(shape) > most:
                failures.append(f"an all-gather of {list(shape)} brings a device more than its own experts, of {most} weights a matrix")
    return failures


def check_sizes(sizes: dict[str, Any], mesh: Mesh) -> list[str]:
    """Whether every device takes its part of the state and little more, and the experts lie in as many parts as the mesh says."""
    failures = []
    parts = mesh.shape["expert"] * mesh.shape["fsdp"] * mesh.shape["tensor"]
    if sizes["expert_parts"] != parts:
        failures.append(f"the experts' weights lie in {sizes['expert_parts']} parts; expected {parts}")
    if sizes["argument_bytes"] > LARGEST_PADDING * sizes["state_bytes_per_device"] + 2**20:
        failures.append(f"a device takes {sizes['argument_bytes']} bytes; its part of the state has {sizes['state_bytes_per_device']}")
    return failures


def _table(topology: str, results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"one training step compiled for {topology}, not run; bytes are of one device"]
    lines += [f"{'program':<10}{'mesh':<34}{'seconds':>8}{'arguments':>13}{'temporary':>13}{'state / whole':>15}  collectives in the text"]
    for name, found in results.items():
        mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
        share = found["state_bytes_per_device"] / found["state_bytes_whole"]
        collectives = ", ".join(f"{kind} {count}" for kind, count in found["collectives"].items())
        lines += [
            f"{name:<10}{mesh:<34}{found['compile_seconds']:>8.0f}{found['argument_bytes']:>13,}{found['temporary_bytes']:>13,}{share:>15.3f}"
            f"  {collectives}"
        ]
    return lines + [f"FAILED {name}: {failure}" for name, found in results.items() for failure in found["failures"]]
