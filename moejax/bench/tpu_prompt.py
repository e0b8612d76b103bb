"""Prompts of 32,768 tokens read by Snowflake Arctic, compiled for TPUs where there are none: compiled, not run.

    python -m moejax.bench tpu_prompt                                        v5p:4x4x4, weights over expert 8 and tensor 8
    python -m moejax.bench tpu_prompt --topology v5p:2x2x4 --expert 2        other chips, another mesh

The program is the one that `prefill_in_chunks` calls: `chunk` tokens a row into a full cache of `length` slots, with all layers in
bfloat16. Weights and cache are shapes without content. What a chip must hold is the compiler's own plan of it. Fails where that is more
than the chip has, and where the program has an array of all scores, of every token of the chunk with every slot of the cache, that is
larger than attention allows itself (`MANY_SCORES`).
"""

import dataclasses
import math
import time
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.bench import PROGRAM
from moejax.bench.tpu_compile import count_collectives, list_instructions, topology_devices
from moejax.config import ModelConfig, UserError
from moejax.planning.chips import CHIPS
from moejax.planning.messages import captured_stderr
from moejax.results import deliver, describe_machine, markdown_table, require_place
from moejax.rope_config import RopeScaling

COLUMNS = (
    "compile_seconds", "weights_gb", "cache_gb", "arguments_gb", "temporary_gb", "total_gb", "fraction_of_chip", "collectives",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compiles the reading of a long prompt for TPUs that are not there."""

    topology: str = "v5p:4x4x4"  # that libtpu knows
    expert: int = 8  # of the mesh, whose other axes are 1 but fsdp, which takes what is left
    tensor: int = 8
    length: int = 32_768  # tokens of the prompt, and slots of the cache
    chunks: tuple[int, ...] = (2048, 32_768)  # tokens of a row that one call reads; a program each
    rows: int = 1  # prompts in a batch
    layers: int = 35  # all of Arctic's; they are one loop in the program
    json: str | None = None  # a file for the result; - prints only the JSON

    def __post_init__(self) -> None:
        for name in ("expert", "tensor", "length", "rows", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        for chunk in self.chunks:
            if chunk < 1 or self.length % chunk:
                raise UserError(f"chunks has {chunk}, which does not divide length={self.length}; a prompt is read in whole chunks here")


def run(arguments: Arguments) -> None:
    """Compiles, checks and reports. Ends with exit status 1 where a check fails."""
    from moejax.sharding import check_mesh, make_mesh

    if arguments.json not in (None, "-"):
        require_place(str(arguments.json), "--json")
    devices = topology_devices(arguments.topology)
    config = long_arctic(arguments.length, arguments.layers)
    mesh = make_mesh(expert=arguments.expert, tensor=arguments.tensor, devices=devices)
    check_mesh(config, mesh)
    rows = [compile_chunk(config, mesh, arguments, chunk) for chunk in arguments.chunks]
    sizes = {"length": arguments.length, "batch_size": arguments.rows, "layers": arguments.layers}
    where = {"topology": arguments.topology, "mesh": dict(mesh.shape)}
    result = {"benchmark": "tpu_prompt", **where, **sizes, "rows": rows, **describe_machine(PROGRAM)}
    deliver(result, tell(arguments, mesh, rows), arguments.json)
    if any(row["failures"] for row in rows):
        raise SystemExit(1)


def long_arctic(length: int, layers: int) -> ModelConfig:
    """Arctic in bfloat16 for texts of this length, its rotary frequencies stretched by YaRN where that is more than it was trained at."""
    from moejax.families.arctic import ARCTIC_480B

    trained = ARCTIC_480B.max_length
    scaling = RopeScaling("yarn", length / trained, trained) if length > trained else RopeScaling()
    return dataclasses.replace(ARCTIC_480B, max_length=length, rope_scaling=scaling, num_layers=layers)


def compile_chunk(config: ModelConfig, mesh: Mesh, arguments: Arguments, chunk: int) -> dict[str, Any]:
    """One program: seconds, bytes of one device, collectives in its text by kind, and `failures`: a line for each check that failed."""
    from moejax.model.prefill import read_chunk
    from moejax.model.transformer import Transformer
    from moejax.serving.abstract import bytes_per_device

    inputs = abstract_inputs(config, mesh, arguments, chunk)
    row: dict[str, Any] = {"name": f"{chunk} tokens a call", "chunk": chunk, "failures": []}
    row |= {"weight_bytes": bytes_per_device(inputs[0]), "cache_bytes": bytes_per_device(inputs[-1])}
    started = time.perf_counter()
    try:
        with captured_stderr():
            compiled = read_chunk.lower(Transformer(config, mesh), False, False, *inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"compile_seconds": time.perf_counter() - started, "failures": [str(error).splitlines()[0][:300]]}
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None  # libtpu has it
    donated = memory.alias_size_in_bytes  # the cache, which comes back where it lay
    return row | {
        "compile_seconds": time.perf_counter() - started,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - donated,
        "program_bytes": memory.generated_code_size_in_bytes,
        "collectives": count_collectives(text),
        "failures": check_program(text, chunk, arguments),
    }


def abstract_inputs(config: ModelConfig, mesh: Mesh, arguments: Arguments, chunk: int) -> tuple[Any, ...]:
    """Shapes and shardings of what `read_chunk` takes behind the model: variables, tokens, counts, features, cache."""
    from moejax.cache_config import CacheConfig
    from moejax.serving.abstract import abstract_cache, abstract_variables, prefill_inputs

    cache = abstract_cache(config, mesh, arguments.rows, arguments.length, CacheConfig())
    return prefill_inputs(config, mesh, abstract_variables(config, mesh), cache, arguments.rows, chunk)


def check_program(text: str, chunk: int, arguments: Arguments) -> list[str]:
    """A line for every array of all scores in the program's text, where those are too many to be there, and for every talk to the host."""
    from moejax.ops.attention import MANY_SCORES

    failures = set()
    for name, shapes in list_instructions(text):
        if name in ("send", "recv", "infeed", "outfeed"):
            failures.add(f"the program has a {name}")
        for found in shapes:
            both = sorted((chunk, arguments.length))
            is_scores = all(found.count(size) >= both.count(size) for size in both)
            if is_scores and math.prod(found) > MANY_SCORES:
                failures.add(f"the program has all scores of a chunk, {list(found)}")
    return sorted(failures)


def tell(arguments: Arguments, mesh: Mesh, rows: list[dict[str, Any]]) -> list[str]:
    """The result as lines for people."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    chip = CHIPS[arguments.topology.partition(":")[0]].hbm_bytes
    lines = [
        f"Arctic's {arguments.layers} layers reading {arguments.rows} x {arguments.length:,} tokens, compiled for {arguments.topology} "
        f"({axes}), not run; GB of one chip"
    ]
    shown = []
    for row in rows:
        parts = {key: row[f"{name}_bytes"] / 1e9 for key, name in _PARTS.items() if f"{name}_bytes" in row}
        total = sum(parts[key] for key in ("arguments_gb", "temporary_gb", "output_gb") if key in parts) or None
        fraction = total * 1e9 / chip if chip and total else None
        collectives = ", ".join(f"{kind} {count}" for kind, count in row.get("collectives", {}).items())
        shown.append({**row, **parts, "total_gb": total, "fraction_of_chip": fraction, "collectives": collectives})
    lines += ["", *markdown_table(shown, COLUMNS)]
    return lines + [f"FAILED {row['name']}: {failure}" for row in rows for failure in row["failures"]]


_PARTS = {
    "weights_gb": "weight", "cache_gb": "cache", "arguments_gb": "argument", "temporary_gb": "temporary", "output_gb": "output",
}  # fmt: skip
