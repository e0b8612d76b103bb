"""How benchmarks measure: warm-up, median and spread, the machine's own ceiling in the same run, a table and JSON."""

import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the repeats after warm-up."""

    median: float
    lowest: float
    highest: float


def time_calls(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Times the functions in turns, so that a disturbance of the machine meets all of them alike."""
    for _ in range(warmup):
        for function in functions.values():
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing(float(np.median(s)), min(s), max(s)) for name, s in seconds.items()}


def matmul_ceiling(size: int = 2048) -> Callable[[], Any]:
    """A square float32 matmul, 2 * size³ FLOP: what the machine does at its best."""
    x = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(x, x)


def describe_machine() -> dict[str, Any]:
    """Device, versions and peak memory: what a figure is worth little without."""
    import flax
    import jaxlib

    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def report(name: str, result: dict[str, Any], json_path: str | None) -> None:
    """Prints the result as a table; with a path, as JSON there too; with `-`, as JSON on stdout and nothing else."""
    result = {"benchmark": name, **result, **describe_machine()}
    if json_path == "-":
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:<44}{f'{value:,.4g}' if isinstance(value, float) else value}")
    if json_path is not None:
        with open(json_path, "w") as file:
            json.dump(result, file, indent=2)
        print(f"written to {json_path}", file=sys.stderr)
