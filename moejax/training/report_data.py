"""What a run's directory says of the run, read leniently: from a run in progress, a killed one, or one of an older version."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.config import UserError, model_from_json
from moejax.families.counts import Counts, count_parameters
from moejax.training.metrics import read_rows
from moejax.training.starts import read_starts

SILENT_SECONDS = 600  # without a row for longer than this, and than five times what rows took before, a run is taken for dead


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it. Nothing but the directory is sure to be there; a missing part is empty."""

    directory: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of training, by step
    evaluations: list[dict[str, Any]]  # one a domain and step
    starts: list[dict[str, Any]]
    checkpoints: list[int]  # the steps of those that are there

    @property
    def name(self) -> str:
        """The run's own name, else its directory's."""
        return str(self.config.get("name") or self.directory.resolve().name)

    @property
    def last(self) -> dict[str, Any]:
        """The last row; empty before the first."""
        return self.rows[-1] if self.rows else {}

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max([self.last.get("step", 0), *(start.get("last_step", 0) for start in self.starts[-1:])])

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None where the configuration does not say."""
        return self.section("train").get("steps")

    @property
    def domains(self) -> list[str]:
        """The domains that were evaluated, in the order of their first evaluation."""
        return list(dict.fromkeys(row["domain"] for row in self.evaluations))

    @property
    def counts(self) -> Counts | None:
        """The model's parameters; None where the configuration is of another version, or lost."""
        if not self.section("model"):
            return None
        try:
            return count_parameters(model_from_json(self.section("model")))
        except (UserError, TypeError):
            return None

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration; empty where there is none."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    def last_evaluation(self, domain: str) -> dict[str, Any]:
        """The latest evaluation of one domain."""
        return [row for row in self.evaluations if row["domain"] == domain][-1]

    @property
    def command(self) -> str:
        """The command that goes on with the run: that of its last start where it is known."""
        known = [start["command"] for start in self.starts if isinstance(start.get("command"), str)]
        return known[-1] if known else f"python train.py configs/{self.name}.py --run-dir {self.directory}"

    def describe_state(self, now: float | None = None) -> tuple[str, str]:
        """A word (done, running, interrupted, failed, stopped) and a sentence, as of `now`, seconds since 1970."""
        now = time.time() if now is None else now
        if self.steps is not None and self.step >= self.steps:
            return "done", f"All {self.steps:,} steps are done."
        last = self.starts[-1] if self.starts else {}
        ended, updated = last.get("ended"), last.get("updated")
        if isinstance(ended, str):
            word = ended.split(":")[0]
            return word, f"The last start ended at step {self.step:,}: {ended}."
        if not isinstance(updated, int | float):
            return "stopped", "When it was last alive is not recorded."
        silent = max(now - updated, 0.0)
        usual = last.get("seconds", 0.0) / max(len(self.rows), 1)
        ago = f"the last sign of life came {describe_seconds(silent)} ago"
        if silent < max(SILENT_SECONDS, 5 * usual):
            return "running", f"In progress: {ago}."
        return "stopped", f"It did not say that it ended, and {ago}: it was killed, or its machine is gone."


def read_run(directory: Path) -> RunRecord:
    """Reads a run's directory. Raises UserError for a path that is none."""
    if not directory.is_dir():
        raise UserError(f"there is no run directory {directory}; expected what train.py writes, as runs/tiny")
    config, rows = _read_config(directory / "config.json"), read_rows(directory / "metrics.jsonl")
    if not rows and not {"model", "train"} <= config.keys():
        raise UserError(
            f"{directory} is not the directory of a run: it has no metrics.jsonl with rows and no config.json with the sections model "
            "and train; expected what train.py writes, as runs/tiny"
        )
    training = sorted((row for row in rows if "domain" not in row), key=lambda row: row["step"])
    evaluations = [row for row in rows if isinstance(row.get("domain"), str)]
    folders = (directory / "checkpoints").glob("*")
    checkpoints = sorted(int(folder.name) for folder in folders if folder.name.isdigit() and (folder / "moejax.json").exists())
    return RunRecord(directory, config, training, evaluations, read_starts(directory / "starts.jsonl"), checkpoints)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def select(rows: Sequence[Mapping[str, Any]], name: str, most: int = 1500) -> tuple[list[float], list[Any]]:
    """(tokens, values) of the rows that have a number or a list under `name`; thinned evenly to about `most`, the last kept."""
    having = [row for row in rows if isinstance(row.get(name), int | float | list) and not isinstance(row[name], bool)]
    stride = -(-len(having) // most) if having else 1
    chosen = [row for index, row in enumerate(having) if (len(having) - 1 - index) % stride == 0]
    return [float(row.get("tokens", row["step"])) for row in chosen], [row[name] for row in chosen]


def select_layers(rows: Sequence[Mapping[str, Any]], name: str, most: int = 400) -> tuple[list[float], list[list[float]]]:
    """(tokens, [rows, layers]) of a list per MoE layer; what is undefined is NaN, and rows of another length are left out."""
    tokens, values = select(rows, name, most)
    both = [(t, [float("nan") if v is None else float(v) for v in value]) for t, value in zip(tokens, values, strict=True) if value]
    layers = len(both[-1][1]) if both else 0
    kept = [(t, value) for t, value in both if len(value) == layers]
    return [t for t, _ in kept], [value for _, value in kept]


def describe_seconds(seconds: float) -> str:
    """A duration in its largest fitting units: 12 s, 3 min, 5.2 h, 3.1 days."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= size * (1 if unit == "h" else 2):
            return f"{seconds / size:,.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def describe_count(number: float) -> str:
    """A number in three figures: 950, 12.3 k, 4.56 M, 1.2 T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
