"""Says what a path holds: a checkpoint or a run of ours, or a published checkpoint; anything else is refused with what was looked for."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from moejax.checkpoint.manifest import METADATA
from moejax.checkpoint.mistral_files import PARAMS, holds_consolidated
from moejax.checkpoint.store import STEPS, latest_step
from moejax.checkpoint.torch_files import INDEX, SINGLE, refuse_foreign_files
from moejax.config import UserError

Kind = Literal["moejax", "run", "hf", "mistral"]


def detect(path: str | Path) -> Kind:
    """What `path` holds: "moejax" (one of our checkpoints), "run" (a run directory of ours), "hf" (a Hugging Face directory),
    "mistral" (Mistral's own layout).

    Where several lie together, the first of these; `list_kinds` gives all. Raises UserError where there is nothing to read.
    """
    directory = Path(path)
    if not directory.exists():
        raise UserError(f"{directory} does not exist{_nearest_hint(directory)}")
    if not directory.is_dir():
        what = "a GGUF checkpoint, which is not read" if directory.suffix == ".gguf" else "a file"
        raise UserError(f"{directory} is {what}; expected a directory: a run, one of its checkpoints, or a Hugging Face model")
    kinds = list_kinds(directory)
    if kinds:
        return kinds[0]
    names = sorted(entry.name for entry in directory.iterdir())
    refuse_foreign_files(directory)
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return "hf"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise UserError(
        f"{directory} holds no checkpoint: looked for {METADATA} (a checkpoint of moejax), {STEPS}/ (a run), config.json with "
        f"{INDEX} or {SINGLE} (Hugging Face), {PARAMS} with consolidated.* (Mistral); found {shown}"
    )


def list_kinds(directory: Path) -> list[Kind]:
    """Everything complete enough to be read that lies in `directory`, in the order in which it is chosen."""
    found: dict[Kind, bool] = {
        "moejax": (directory / METADATA).exists(),
        "run": (directory / STEPS).is_dir(),
        "hf": (directory / INDEX).exists() or (directory / SINGLE).exists(),
        "mistral": holds_consolidated(directory),
    }
    return [kind for kind, is_there in found.items() if is_there]


def find_checkpoint(path: str | Path) -> tuple[Literal["moejax", "hf", "mistral"], Path]:
    """What `path` holds and the checkpoint to read there: `path` itself, or the newest complete one of a run. Raises UserError."""
    kind = detect(path)
    if kind != "run":
        return kind, Path(path)
    newest = latest_step(Path(path))
    if newest is None:
        raise UserError(f"{path} is a run without a complete checkpoint in {STEPS}/; let it train to its first save")
    return "moejax", newest


def _nearest_hint(path: Path) -> str:
    """What to write instead of a path that does not exist: its nearest sibling, or the part of it that does exist."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        return f"; of its path only {parent}{' ' if parent.is_dir() else ' (a file) '}exists"
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    return f"; did you mean {parent / near[0]}?" if near else f"; nothing in {parent} has a similar name"
