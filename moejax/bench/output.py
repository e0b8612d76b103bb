"""What every benchmark tells, and how: a table, JSON with the same keys in each, and a comparison with an earlier JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.bench import PROGRAM
from moejax.bench.measure import peak_memory
from moejax.config import UserError
from moejax.results import deliver, describe_machine, format_value, is_number, markdown_table, require_place

# In every benchmark's JSON; null where the thing measured has no such figure. fraction_of_ceiling is that of the FLOP/s, or of the bytes/s
# where `bound` says so. Of several rows, the first one's figures stand on top.
COMMON = (
    "tokens_per_second", "flops_per_second", "bytes_per_second", "ceiling_flops_per_second", "ceiling_bytes_per_second",
    "fraction_of_ceiling", "bound", "seconds", "seconds_lowest", "seconds_highest", "compile_seconds", "temporary_bytes",
    "peak_resident_bytes", "peak_device_bytes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a benchmark's results go: the fields that the arguments of each of them share."""

    json: str | None = None  # a file for the result; - prints only the JSON
    against: str | None = None  # the JSON of an earlier run of this benchmark, to be compared with


def check_output(name: str, output: Output) -> None:
    """Raises UserError, before anything is measured, for places that cannot be written and results that cannot be compared with."""
    if output.against is not None:
        read_result(name, output.against, "--against")
    if output.json not in (None, "-"):
        require_place(str(output.json), "--json")


def read_result(name: str, file: str, flag: str) -> dict[str, Any]:
    """The result of an earlier run of benchmark `name`. Raises UserError for a file that is none."""
    wanted = f"{flag} {file}: expected the JSON of `python -m moejax.bench {name} --json FILE`"
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{wanted}, but it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{wanted}, but it is no JSON ({error})".replace("\n", " ")) from error
    if not isinstance(result, dict) or not isinstance(result.get("benchmark"), str):
        raise UserError(f"{wanted}, but it has no field `benchmark`")
    if result["benchmark"] != name:
        raise UserError(f"{wanted}, but it is of benchmark {result['benchmark']!r}; compare like with like")
    rows = result.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows):
        raise UserError(f"{wanted}, but its `rows` are no list of named results")
    return result


def report(name: str, result: dict[str, Any], output: Output, columns: Sequence[str] = ()) -> dict[str, Any]:
    """Prints the result as the output asks, and returns it with the common keys, those of the first row on top.

    `result["rows"]`, where there are several things measured, are dicts with a `name` each; `columns` are those of their table.
    """
    earlier = None if output.against is None else read_result(name, output.against, "--against")
    rows = result.get("rows", [])
    first = {key: value for key, value in rows[0].items() if key in COMMON} if rows else {}
    whole = {"benchmark": name, **dict.fromkeys(COMMON), **peak_memory(), **first, **result, **describe_machine(PROGRAM)}
    deliver(whole, _tell(whole, columns) if earlier is None else _compare(whole, earlier, columns), output.json)
    return whole


def _tell(whole: dict[str, Any], columns: Sequence[str]) -> list[str]:
    lines = []
    if whole.get("rows"):
        lines = [*markdown_table(whole["rows"], columns), ""]
    shown = {key: value for key, value in whole.items() if key != "rows" and value is not None}
    return lines + [f"{key:<44}{format_value(key, value)}" for key, value in shown.items()]


def _compare(whole: dict[str, Any], earlier: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Three columns: now, before, now/before; the top's keys, then those of the rows that both have."""
    rows, others = ({row["name"]: row for row in result.get("rows", [])} for result in (whole, earlier))
    lines = [f"{'':<52}{'now':>24}{'before':>24}{'now/before':>12}"]
    for name in (name for name in rows if name in others):
        lines += [_compare_values(f"{name}: {key}", key, rows[name].get(key), others[name].get(key)) for key in columns]
    for key in (key for key in whole if key != "rows" and not (rows and key in COMMON)):
        lines.append(_compare_values(key, key, whole[key], earlier.get(key)))
    lines = [line for line in lines if line]
    missing = rows.keys() ^ others.keys()
    return [*lines, f"not in both: {', '.join(sorted(missing))}"] if missing else lines


def _compare_values(label: str, key: str, now: Any, before: Any) -> str:
    if now is None and before is None:
        return ""
    ratio = ""
    if is_number(now) and is_number(before) and before:
        ratio = f"{now / before:.3f}"
    return f"{label:<52}{format_value(key, now)[:22]:>24}{format_value(key, before)[:22]:>24}{ratio:>12}"
