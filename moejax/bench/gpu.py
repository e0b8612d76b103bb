"""Checks and times everything that is written for NVIDIA GPUs, in one call of under ten minutes on one GPU.

Kernels against their references, then grouped matmuls, an MoE layer, attention, decoding and whole training steps, each way of doing a
thing beside the others. What fails is said in its row, and the rest goes on.
"""

import sys
import time
from dataclasses import dataclass
from typing import Any

import jax

from moejax.bench import PROGRAM
from moejax.bench.gpu_items import ITEMS, Sizes, attempt
from moejax.config import UserError
from moejax.results import deliver, describe_machine, require_place

LARGEST_ERROR = 0.02  # of a kernel in bfloat16 against its reference in float32, relative to the largest entry


@dataclass(frozen=True)
class Arguments:
    """Checks and times the kernels on one NVIDIA GPU."""

    items: tuple[str, ...] = tuple(ITEMS)
    seconds: int = 540  # nothing is begun after so long
    json: str | None = None  # a file for the result; - prints only the JSON

    def __post_init__(self) -> None:
        for name in self.items:
            if name not in ITEMS:
                raise UserError(f"items has {name!r}; expected some of {', '.join(ITEMS)}")


def run(arguments: Arguments) -> None:
    """Measures and reports. Raises UserError without a GPU; ends with exit status 1 where a kernel differs from its reference."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"bench gpu needs an NVIDIA GPU, but jax has {device.device_kind}; run it where one is, with jax[cuda12]")
    if arguments.json not in (None, "-"):
        require_place(str(arguments.json), "--json")
    results = measure_items(arguments.items, Sizes(), arguments.seconds)
    report(results, arguments.json)
    errors = [row.get("relative_error", 0.0) for rows in results.values() for row in rows]
    if not all(error <= LARGEST_ERROR for error in errors):  # what is not a number is not small
        raise SystemExit(1)


def measure_items(items: tuple[str, ...], sizes: Sizes, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Rows by item. An item that raises has a row of its own saying so; what there is no time for is left out, and said."""
    started, results = time.monotonic(), {}
    for name in items:
        rows = results[name] = []
        found = attempt({}, lambda name=name, rows=rows: _fill(rows, ITEMS[name](sizes), started + seconds))
        rows += [found] if found else []
        jax.clear_caches()
    return results


def _fill(rows: list[dict[str, Any]], found: Any, until: float) -> dict[str, Any]:
    while time.monotonic() < until:
        row = next(found, None)
        if row is None:
            return {}
        rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)
    return {"error": "no time was left for the rest"}


def report(results: dict[str, list[dict[str, Any]]], json_path: str | None) -> None:
    """The result as tables; with a path, as JSON there too; with `-`, as JSON on stdout and nothing else."""
    machine = describe_machine(PROGRAM)
    lines = [", ".join(f"{key} {value}" for key, value in machine.items())]
    for name, rows in results.items():
        lines += ["", name, *(f"  {_line(row)}" for row in rows)]
    deliver({"benchmark": "gpu", "items": results, **machine}, lines, json_path)


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
