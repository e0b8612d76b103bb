"""Says what a path holds: a checkpoint or a run of ours, or a published checkpoint; anything else is refused with what was looked for."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from moejax.checkpoint.manifest import METADATA
from moejax.checkpoint.store import STEPS, latest_step
from moejax.checkpoint.torch_files import INDEX, refuse_foreign_files
from moejax.config import UserError

Kind = Literal["moejax", "run", "hf"]


def detect(path: str | Path) -> Kind:
    """What `path` holds: "moejax" (one of our checkpoints), "run" (a run directory of ours), "hf" (a Hugging Face directory).

    Where several lie together, the first of these. Raises UserError for everything else.
    """
    directory = Path(path)
    if not directory.exists():
        raise UserError(f"{directory} does not exist{_nearest_hint(directory)}")
    if not directory.is_dir():
        what = "a GGUF checkpoint, which is not read" if directory.suffix == ".gguf" else "a file"
        raise UserError(f"{directory} is {what}; expected a directory: a run, one of its checkpoints, or a Hugging Face model")
    if (directory / METADATA).exists():
        return "moejax"
    if (directory / STEPS).is_dir():
        return "run"
    names = sorted(entry.name for entry in directory.iterdir())
    if "config.json" not in names and ("params.json" in names or any(name.startswith("consolidated.") for name in names)):
        raise UserError(
            f"{directory} is in Mistral's own layout (params.json, consolidated.*), which is not read yet; "
            "use the Hugging Face checkpoint of the same model"
        )
    refuse_foreign_files(directory)
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return "hf"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise UserError(
        f"{directory} holds no checkpoint: looked for {METADATA} (a checkpoint of moejax), {STEPS}/ (a run), and config.json with "
        f"{INDEX} or model.safetensors (Hugging Face); found {shown}"
    )


def find_checkpoint(path: str | Path) -> tuple[Literal["moejax", "hf"], Path]:
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
