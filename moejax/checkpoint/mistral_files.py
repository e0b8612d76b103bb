"""Reads Mistral's own layout: params.json beside consolidated.safetensors, consolidated.00.pth, or the first release's eight files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moejax.checkpoint.safetensors_file import read_header
from moejax.checkpoint.torch_files import TensorFiles, read_json, read_parameters_from, settle_dtype
from moejax.config import ModelConfig, UserError
from moejax.families import get_family

PARAMS = "params.json"
CONSOLIDATED = "consolidated.safetensors"
PICKLE = "consolidated.00.pth"
FIRST_RELEASE = re.compile(r"consolidated\.(\d\d)\.pt")


def holds_consolidated(directory: Path) -> bool:
    """Whether `directory` has weights in Mistral's own layout."""
    return any(re.fullmatch(r"consolidated\.(safetensors|\d\d\.pth?)", path.name) for path in directory.iterdir())


def open_tensors(directory: Path) -> TensorFiles:
    """Opens the weights of `directory`: consolidated.safetensors, else consolidated.00.pth, else consolidated.00.pt and those after it.

    Reads no weight. Raises UserError for missing, truncated and damaged files, for pickles that hold more than tensors, and, naming
    the extra to install, where a pickle is to be read and torch is not there.
    """
    if (directory / CONSOLIDATED).exists():
        return TensorFiles(directory, read_header(directory / CONSOLIDATED))
    from moejax.checkpoint.pickle_files import PickledTensors

    names = sorted(path.name for path in directory.iterdir())
    if PICKLE in names:
        others = [name for name in names if re.fullmatch(r"consolidated\.\d\d\.pth", name) and name != PICKLE]
        if others:
            raise UserError(
                f"{directory} has {', '.join(others[:3])} beside {PICKLE}: several files split every tensor, which no Mixtral does and "
                "which is not read; use the Hugging Face checkpoint of the model"
            )
        return PickledTensors(directory, [directory / PICKLE])
    parts = [int(match[1]) for match in map(FIRST_RELEASE.fullmatch, names) if match]
    if not parts:
        raise UserError(f"{directory} has neither {CONSOLIDATED} nor {PICKLE} nor consolidated.00.pt; download the whole directory")
    absent = sorted(set(range(max(parts) + 1)) - set(parts))
    if absent:
        raise UserError(f"{directory} lacks consolidated.{absent[0]:02}.pt, but has consolidated.{max(parts):02}.pt; download it again")
    return PickledTensors(directory, [directory / f"consolidated.{part:02}.pt" for part in sorted(parts)])


def read_model_config(directory: Path, dtype: str | None = None) -> ModelConfig:
    """The ModelConfig of a checkpoint in Mistral's layout, from params.json; `dtype` as of torch_files.read_model_config."""
    path = directory / PARAMS
    values = read_json(path, f"{directory} has no {PARAMS} beside its weights; download the whole directory of the model")
    read = get_family("mixtral").config_from_original
    assert read is not None
    config = read(values, str(path))
    with open_tensors(directory) as files:
        return settle_dtype(config, files, dtype)


def read_parameters(directory: Path, config: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """The parameter tree of a checkpoint in Mistral's layout, as torch_files.read_parameters gives that of Hugging Face's."""
    with open_tensors(directory) as files:
        return read_parameters_from(files, config, dtype)
