"""What every evaluation is given and tells: a checkpoint; a table, JSON with the same keys in each, and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moejax.config import UserError
from moejax.evals import PROGRAM
from moejax.figures import check_figure
from moejax.results import deliver, describe_machine, format_value, markdown_table, require_place


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where an evaluation's results go: the fields that the arguments of each of them share."""

    checkpoint: str | None = None  # a run, a checkpoint, a published model or an id of the Hub: whatever `moejax.load` reads
    dtype: str | None = None  # of weights and compute; None: the checkpoint's
    json: str | None = None  # a file for the result; - prints only the JSON
    figure: str | None = None  # a file for the figure, .svg or .png


def check_output(name: str, output: Output) -> None:
    """Raises UserError, before a model is read, where there is none to read and for places that cannot be written."""
    if output.checkpoint is None:
        raise UserError(f"{name} asks a model; name one with --checkpoint, a run's directory as runs/tiny or any other that moejax reads")
    if output.json not in (None, "-"):
        require_place(str(output.json), "--json")
    check_figure(output.figure)


def load_model(output: Output) -> tuple[Any, Any, Any]:
    """(model, variables, tokenizer) of the checkpoint. Raises UserError for one without a tokenizer."""
    import moejax

    model, variables, tokenizer = moejax.load(str(output.checkpoint), dtype=output.dtype)
    if tokenizer is None:
        raise UserError(f"{output.checkpoint} has no tokenizer, and text must become tokens; put its tokenizer's file beside the weights")
    return model, variables, tokenizer


def report(name: str, result: dict[str, Any], output: Output, columns: Sequence[str]) -> dict[str, Any]:
    """Prints the result as the output asks, and returns it with what all evaluations have: checkpoint, dtype, seconds, the machine.

    `result["rows"]` are dicts with a `name` each; `columns` are those of their table.
    """
    whole = {"evaluation": name, "checkpoint": output.checkpoint, "seconds": None, **result, **describe_machine(PROGRAM)}
    shown = {key: value for key, value in whole.items() if not isinstance(value, list | dict) and value is not None}
    lines = [*markdown_table(whole["rows"], columns), "", *(f"{key:<32}{format_value(key, value)}" for key, value in shown.items())]
    deliver(whole, lines, output.json)
    return whole
