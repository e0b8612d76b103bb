"""What a run tells: metrics.jsonl for machines, a line of progress for people."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moejax.files import write_file


class MetricsLog:
    """Appends one JSON object a line to a file that is made on the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drops the rows past `step`, which a resumed run writes again, and a line cut short by a kill."""
        self._keep(lambda row: row["step"] <= step)

    def write(self, row: dict[str, Any]) -> None:
        """Appends `row`; the file is closed after every line, so that a killed run loses none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(without_nonfinite(row), allow_nan=False) + "\n")

    def write_evaluation(self, row: dict[str, Any]) -> None:
        """Appends an evaluation row in place of an earlier one of the same step and domain."""
        self._keep(lambda other: (other["step"], other.get("domain")) != (row["step"], row["domain"]))
        self.write(row)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if (row := _parse(line)) is not None and wanted(row)]
        if len(kept) < len(lines):
            write_file(self.path, "".join(line + "\n" for line in kept))


def _parse(line: str) -> dict[str, Any] | None:
    """A row; None for a line cut short by a kill."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in its order, without lines that are none; empty where there is no file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [row for row in map(_parse, lines) if row is not None]


def without_nonfinite(value: Any) -> Any:
    """The value with None for every number that is infinite or undefined, which JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: without_nonfinite(item) for name, item in value.items()}
    return [without_nonfinite(item) for item in value] if isinstance(value, list) else value


class Progress:
    """Prints step, loss, tokens/s, utilisation and the time left, which is reckoned without the first step's: that one compiles."""

    def __init__(self, steps: int, log: Callable[[str], None]) -> None:
        self.steps, self.log = steps, log
        self.compiled: tuple[int, float] | None = None  # step and time at which compiling was over

    def update(self, row: Mapping[str, Any], now: float, seconds: float) -> None:
        """Prints a line about a row of metrics.jsonl written at `now`, `seconds` after the one before."""
        step = row["step"]
        words = [f"step {step}/{self.steps}", f"loss {row['loss']:.3f}"]
        if self.compiled is None:
            words.append(f"(compiled in {format_duration(seconds)})")
            self.compiled = (step, now)
        else:
            first_step, first_time = self.compiled
            remaining = (self.steps - step) * (now - first_time) / (step - first_step)
            words += [f"{row['tokens_per_second']:,.0f} tokens/s", f"MFU {row['mfu']:.1%}", f"ETA {format_duration(remaining)}"]
        words += [f"{name.replace('_', ' ')} {row[name]:,.0f}" for name in ("skipped_steps", "dropped_tokens") if row.get(name)]
        self.log("  ".join(words))

    def evaluated(self, step: int, bits_per_byte: Mapping[str, float]) -> None:
        """Prints one line about an evaluation of all domains."""
        domains = "  ".join(f"{domain} {value:.3f}" for domain, value in bits_per_byte.items())
        self.log(f"step {step}/{self.steps}  held-out bits per byte: {domains}")


def format_duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
