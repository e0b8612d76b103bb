"""The directory of a run: config.json, tokenizer, metrics.jsonl, checkpoints/. One directory holds one run."""

import json
import os
from pathlib import Path
from typing import Any

from moejax.config import RunConfig, UserError, to_json

# Fields of the model that change how it is computed, not what it is: a run may go on with others.
HOW_NOT_WHAT = {"dispatch", "dtype", "remat"}


def claim_run_directory(config: RunConfig) -> Path:
    """Makes the run's directory and writes its config.json, or checks that the run found there is this one.

    A run may go on with other train, mesh and sample settings. Raises UserError, naming the fields, where the model or the data
    differ: its weights would not fit, or its rows would not be the ones it has not seen yet.
    """
    directory = Path(config.directory)
    path = directory / "config.json"
    values = to_json(config)
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); restore it, or train elsewhere with --run-dir") from error
        _refuse_other_run(directory, before, values)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write the run directory {directory}: {error.strerror}; choose another with --run-dir") from error
    return directory


def _refuse_other_run(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differences = []
    for section, ignored in (("model", HOW_NOT_WHAT), ("data", set())):
        for name, value in now[section].items():
            old = before.get(section, {}).get(name)
            if name not in ignored and old != value:
                differences.append(f"{section}.{name} was {old!r} and is now {value!r}")
    if differences:
        raise UserError(
            f"{directory} holds a run of a different model or data: {'; '.join(differences)}. Choose another directory with --run-dir, "
            "set the fields back, or remove it to start over"
        )
