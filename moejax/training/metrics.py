"""What a run tells: metrics.jsonl for machines, a line of progress for people."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
            file.write(json.dumps(row) + "\n")

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
            temporary = self.path.with_suffix(".tmp")
            try:
                temporary.write_text("".join(line + "\n" for line in kept))
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)


def _parse(line: str) -> dict[str, Any] | None:
    """A row; None for a line cut short by a kill."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


class Progress:
    """Prints step, loss, tokens/s and ETA. The first step, which compiles, counts in neither."""

    def __init__(self, start: int, steps: int, tokens_per_step: int, log: Callable[[str], None]) -> None:
        self.steps, self.tokens_per_step, self.log = steps, tokens_per_step, log
        self.last, self.last_time = start, time.perf_counter()
        self.compiled: tuple[int, float] | None = None  # step and time at which compiling was over

    def update(self, step: int, loss: float) -> float:
        """Prints one line; returns tokens per second since the line before."""
        now = time.perf_counter()
        rate = (step - self.last) * self.tokens_per_step / max(now - self.last_time, 1e-9)
        if self.compiled is None:
            self.log(f"step {step}/{self.steps}  loss {loss:.3f}  (compiled in {format_duration(now - self.last_time)})")
            self.compiled = (step, now)
        else:
            first_step, first_time = self.compiled
            remaining = (self.steps - step) * (now - first_time) / (step - first_step)
            self.log(f"step {step}/{self.steps}  loss {loss:.3f}  {rate:,.0f} tokens/s  ETA {format_duration(remaining)}")
        self.last, self.last_time = step, now
        return rate


def format_duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
