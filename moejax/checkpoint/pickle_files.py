"""Reads `.pth` and `.pt` files of PyTorch: the one place that imports torch, and only when such a file is opened.

They are pickles, which can run any program when loaded. torch's restricted loader is used, which builds tensors and plain
containers and refuses everything else before it runs; files are memory-mapped, so that opening one reads no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moejax.checkpoint.safetensors_file import Tensor
from moejax.checkpoint.torch_files import TensorFiles
from moejax.config import UserError

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


class PickledTensors(TensorFiles):
    """The tensors of several `.pth` files by key, as TensorFiles gives those of safetensors files."""

    def __init__(self, directory: Path, files: list[Path]) -> None:
        tensors: dict[str, Tensor] = {}
        self._arrays: dict[str, np.ndarray] = {}
        for file in files:
            for key, (dtype, array) in _load(file).items():
                if key in tensors:
                    raise UserError(
                        f"{file} holds {key}, which {tensors[key].file.name} holds too; files that split single tensors are not read, "
                        "use the Hugging Face checkpoint of the model"
                    )
                tensors[key] = Tensor(file, dtype, array.shape, 0)
                self._arrays[key] = array
        super().__init__(directory, tensors)

    def __exit__(self, *_: object) -> None:
        self._arrays.clear()  # unmaps the files

    def read_into(self, key: str, source_index: tuple[int | slice, ...], out: np.ndarray) -> None:
        """Fills `out` with the part `source_index` of tensor `key` (all of it where empty), in `out`'s dtype."""
        out[...] = self._arrays[key][source_index]


def _load(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors of one file: key -> (dtype as safetensors names it, array over the mapped file). Raises UserError, naming the file."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} is a file of PyTorch, and torch is not installed; install it: pip install 'moejax[torch]'") from None
    try:
        values = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # torch's own text goes on to advise loading the file without restriction; only what it met is quoted.
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        reason = text.splitlines()[0].partition(". ")[0][:200]
        raise UserError(
            f"{file} is not read: it holds more than tensors, is damaged, or is in PyTorch's format of before 2020 ({reason}); nothing "
            "in it was run; download it again from a source you trust, or use the safetensors files of the model"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{file} holds a {type(values).__name__}, expected tensors by name; it is no consolidated checkpoint of Mistral")

    def convert(key: str, tensor: Any) -> tuple[str, np.ndarray]:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{file}: {key} is no plain tensor ({type(tensor).__name__}); use the safetensors files of the model")
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in _NAMES:
            return name, np.empty(tensor.shape, np.void)  # refused by name when its dtype is asked for
        if name == "bfloat16":  # numpy has none
            return "BF16", tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return _NAMES[name], tensor.detach().numpy()

    return {key: convert(key, tensor) for key, tensor in values.items()}
