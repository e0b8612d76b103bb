"""How commands that measure tell what they found: a table, JSON, and the machine it was found on.

jax is imported only where the machine is described.
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.checks import UserError
from moejax.files import write_file


def require_place(file: str, flag: str) -> None:
    """Raises UserError where `file` could not be written, as far as one can see beforehand."""
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{flag} {file} is a directory; give a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {file}: there is no directory {path.parent}; make it, or write elsewhere")


def deliver(result: dict[str, Any], lines: Sequence[str], json_path: str | None) -> None:
    """Prints the lines; with a path, writes the result as JSON there too; with `-`, prints the JSON and nothing else."""
    if json_path == "-":
        print(json.dumps(result))
        return
    print("\n".join(lines))
    if json_path is not None:
        write_result(Path(json_path), json.dumps(result, indent=2) + "\n")
        print(f"written to {json_path}", file=sys.stderr)


def write_result(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all. Raises UserError where that is not possible."""
    try:
        write_file(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); write elsewhere") from error


def markdown_table(rows: list[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """The rows as the lines of a Markdown table: `name`, then the columns that any row has."""
    shown = ["name", *(column for column in columns if any(row.get(column) is not None for row in rows))]
    cells = [shown, *([format_value(column, row.get(column)) for column in shown] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(shown))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def format_value(key: str, value: Any) -> str:
    """A value for people: fractions in percent, rates and bytes with their unit."""
    if value is None:
        return ""
    if not is_number(value):
        return str(value)
    if key.startswith("fraction_of"):
        return f"{value:.1%}"
    for ending, unit in (("flops_per_second", "GFLOP/s"), ("bytes_per_second", "GB/s")):
        if key.endswith(ending):
            return f"{value / 1e9:,.4g} {unit}"
    if key.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def is_number(value: Any) -> bool:
    """Whether a value is a number; truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def describe_machine(program: str) -> dict[str, Any]:
    """Device, versions, date and what else ran: what a figure is worth little without. `program` is what the flags were given to."""
    import flax
    import jax
    import jaxlib
    import numpy

    import moejax

    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "devices": jax.device_count(),
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        # Pages of 2 MB for large temporaries: glibc gives 4 kB ones otherwise, and every first touch of one is a fault.
        "large_pages": "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "").split(":"),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([program, *sys.argv[1:]]),
        "python": platform.python_version(),
        "moejax": moejax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": numpy.__version__,
    }
