"""A configuration's own training step compiled for TPUs where there are none, and what a chip must hold for it: compiled, not run.

    python -m moejax.bench tpu_step --config configs/arctic_480b_32k.py --topology v5p:8x8x8

Loss, gradients and optimiser at the config's sizes, on its mesh, over the devices of the topology. Weights and moments are shapes without
content. Fails where the compiler finds no plan that fits a chip.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moejax.bench import PROGRAM
from moejax.bench.tpu_compile import abstract_batch, captured_stderr, count_collectives, topology_devices
from moejax.cli import load_config
from moejax.config import RunConfig, UserError
from moejax.results import deliver, describe_machine, require_place

CONFIGS = Path("configs")


@dataclass(frozen=True)
class Arguments:
    """Compiles a run's training step for TPUs that are not there."""

    config: str = "configs/arctic_480b_32k.py"  # a config file
    topology: str = "v5p:8x8x8"  # that libtpu knows
    json: str | None = None  # a file for the result; - prints only the JSON


def run(arguments: Arguments) -> None:
    """Compiles and reports."""
    if arguments.json not in (None, "-"):
        require_place(str(arguments.json), "--json")
    config = load_config(Path(arguments.config), CONFIGS)[0]
    found = compile_step(config, topology_devices(arguments.topology))
    where = {"config": arguments.config, "topology": arguments.topology}
    result = {"benchmark": "tpu_step", **where, **found, **describe_machine(PROGRAM)}
    deliver(result, tell(result), arguments.json)


def compile_step(config: RunConfig, devices: list[Any]) -> dict[str, Any]:
    """Seconds, bytes of one device, collectives in the program's text by kind. Raises UserError for what fits no chip, or no mesh."""
    from dataclasses import asdict

    from moejax.model.transformer import Transformer
    from moejax.sharding import check_mesh, make_mesh
    from moejax.training.state import abstract_state, create_optimizer
    from moejax.training.step import train_step

    mesh = make_mesh(**asdict(config.mesh), devices=devices)
    check_mesh(config.model, mesh)
    model, optimizer = Transformer(config.model, mesh), create_optimizer(config.train)
    shape = (config.train.batch_size, config.data.sequence_length)
    started = time.perf_counter()
    try:
        with captured_stderr():
            compiled = train_step.lower(model, optimizer, abstract_state(model, optimizer), abstract_batch(mesh, shape)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the step fits no chip: {str(error).splitlines()[0]}; use a larger mesh, or shorter or fewer rows") from error
    memory = compiled.memory_analysis()
    assert memory is not None  # libtpu has it
    return {
        "mesh": dict(mesh.shape),
        "batch_size": shape[0],
        "sequence_length": shape[1],
        "compile_seconds": time.perf_counter() - started,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": count_collectives(compiled.as_text() or ""),
    }


def tell(result: dict[str, Any]) -> list[str]:
    """The result as lines for people."""
    axes = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    parts = {"arguments": result["argument_bytes"], "temporaries": result["temporary_bytes"]}
    parts["in all"] = sum(parts.values())
    collectives = ", ".join(f"{kind} {count}" for kind, count in result["collectives"].items())
    return [
        f"a training step of {result['config']}, {result['batch_size']} x {result['sequence_length']:,} tokens, compiled for "
        f"{result['topology']} ({axes}) in {result['compile_seconds']:.0f} s, not run; GB of one chip",
        *(f"{name:<14}{size / 1e9:>8.1f}" for name, size in parts.items()),
        f"collectives in the text: {collectives}",
    ]
