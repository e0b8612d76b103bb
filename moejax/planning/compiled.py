"""A program compiled for a topology, and what can be said of it: memory from the compiler's own plan, time from its schedule."""

import contextlib
import platform
import re
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.planning.links import describe_group
from moejax.planning.messages import captured_stderr
from moejax.planning.program import Program, read_program
from moejax.planning.timeline import Timeline, summarise_collectives, walk
from moejax.planning.topology import Topology

ASSUMPTIONS = (
    "links and rates as in moejax/planning/chips.py, all links free of other traffic",
    "an instruction takes the longest of FLOP at peak, bytes at HBM bandwidth and the TPU compiler's own estimate; kernels (attention, "
    "grouped matmul) their FLOP at peak, as the compiler gives none for them",
    "one collective at a time in each dimension of the torus; a step of one costs 1 microsecond",
    "every expert gets as many tokens as every other",
    "nothing is waited for but links: no input, no checkpoint, no host, no slower chip",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass
class Compiled:
    """What a compiled program needs on one device. Bytes are the compiler's; `argument_bytes` counts what is donated once."""

    compile_seconds: float
    argument_bytes: int = 0
    output_bytes: int = 0  # that do not lie where an argument lay
    temporary_bytes: int = 0  # all of them, whether at the same time or not
    program_bytes: int = 0
    needed_bytes: int = 0  # all of them; where it does not fit, what the compiler says that it needs
    fits: bool = True
    compiler_flops: float | None = None  # of cost_analysis: a loop's body counted once
    program: Program | None = None
    timeline: Timeline = field(default_factory=Timeline)


def compile_program(lowered: Any, mesh: Mesh, topology: Topology, options: dict[str, Any], filled: float = 1.0) -> Compiled:
    """Compiles what jit lowered for the topology's devices, and reads the result. What fits no chip comes back with `fits` False.

    `filled`: share of the rows of grouped matmuls that are there. Raises what the compiler raises for anything else.
    """
    started = time.perf_counter()
    try:
        with captured_stderr():
            compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:  # another failure; a kernel that needs more than the memory beside the cores is one
            raise
        return Compiled(time.perf_counter() - started, needed_bytes=needed, fits=False)
    seconds, memory = time.perf_counter() - started, compiled.memory_analysis()
    assert memory is not None
    program = read_program(compiled.as_text() or "")
    cost = compiled.cost_analysis() or {}
    sizes = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
    }
    # A TPU's temporaries reuse what is donated: their sum is more than is ever held, and the compiler goes by the peak, arguments included.
    peak = getattr(memory, "peak_memory_in_bytes", 0) if topology.chip is not None else 0
    needed = peak + sizes["program_bytes"] if peak else sum(sizes.values())
    limit = None if topology.name != "local" else memory_of(topology)  # TPUs' compiler has refused what does not fit
    return Compiled(
        seconds,
        **sizes,
        needed_bytes=needed,
        fits=limit is None or needed <= limit,
        compiler_flops=cost.get("flops"),
        program=program,
        timeline=walk(program, mesh, topology, filled),
    )


def _needed(message: str) -> int | None:
    """Bytes of HBM that libtpu's refusal names, arguments and results included, whatever it calls them; None of another refusal.

    'the total memory required for HLO temporaries (26.84G) exceeds available HBM (15.75G)', or 'Used 112.50G of 95.74G hbm'.
    """
    found = re.search(r"total memory required for [\w ]*\(([0-9.]+)([KMGT]?)\) exceeds available HBM", message)
    found = found or re.search(r"Used ([0-9.]+)([KMGT]?) of [0-9.]+[KMGT]? hbm", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def memory_of(topology: Topology) -> int | None:
    """Bytes of memory of one device: the chip's, or of local devices what they say of themselves; the host's, shared, for CPUs."""
    if topology.chip is not None:
        return int(topology.chip.hbm_bytes)
    device = topology.devices[0]
    if device.platform == "cpu":
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(topology.devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def describe_collectives(timeline: Timeline) -> list[dict[str, Any]]:
    """Rows for JSON: collectives alike put together, longest first. Bytes and seconds are those of one device in one step."""
    rows = []
    key = lambda one: (one.kind, one.group.axes, one.direction, one.is_async)  # noqa: E731
    for (kind, axes, direction, is_async), found in summarise_collectives(timeline.collectives, key).items():
        largest = max(found, key=lambda one: one.bytes)
        rows.append(
            {
                "kind": kind,
                "axes": list(axes),
                "direction": direction,
                "asynchronous": is_async,
                "runs": sum(one.count for one in found),
                "bytes": sum(one.count * one.bytes for one in found),
                "seconds": sum(one.count * one.seconds for one in found),
                "hidden_seconds": sum(one.count * one.hidden for one in found),
                "group": describe_group(largest.group),
            }
        )
    return rows


def describe_chip(topology: Topology) -> dict[str, Any] | None:
    """The chip's row of the table, for JSON."""
    from dataclasses import asdict

    return None if topology.chip is None else asdict(topology.chip)


def describe_versions() -> dict[str, str]:
    """What a plan was made with: the versions of python, jax and the compiler, of those that are installed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
