"""Reads one safetensors file: its header, and tensors or contiguous parts of them straight into arrays that are there already; and
makes the header of one to be written.

The safetensors library reads the same files into fresh arrays; reading into the destination is about six times faster, needs no
second copy, and takes bfloat16 whatever the library's version.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax.config import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
CONVERTED_AT_ONCE = 1 << 20  # numbers held in the file's dtype while they become another


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its dtype as the format names it, its shape, and its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError, naming the file, where it is truncated or no safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(
                f"{path} is no whole safetensors file: its header should be {length:,} bytes long, the file has {size:,}; "
                "it is truncated or of another format, copy or download it again"
            )
        try:
            entries = json.loads(file.read(length))
            tensors = {name: _parse_entry(path, 8 + length, entry) for name, entry in entries.items() if name != "__metadata__"}
            ends = [8 + length + entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has a damaged safetensors header ({error}); copy or download it again") from error
    expected = max(ends, default=8 + length)
    if size != expected:
        raise UserError(
            f"{path} holds {size:,} bytes, its header promises {expected:,}; it is {'truncated' if size < expected else 'damaged'}, "
            "copy or download it again"
        )
    return tensors


def _parse_entry(path: Path, start: int, entry: dict) -> Tensor:
    shape, (first, end) = tuple(int(length) for length in entry["shape"]), entry["data_offsets"]
    expected = math.prod(shape) * ITEM_BYTES.get(entry["dtype"], 0)
    if first < 0 or (entry["dtype"] in ITEM_BYTES and end - first != expected):
        raise ValueError(f"a tensor of dtype {entry['dtype']} and shape {list(shape)} cannot lie in bytes {first} to {end}")
    return Tensor(path, entry["dtype"], shape, start + first)


def read_tensor_into(handle: int, tensor: Tensor, source_index: tuple[int | slice, ...], out: np.ndarray) -> None:
    """Fills `out` (C-contiguous) with `tensor[source_index]`, converting the dtype where `out` has another one.

    `handle` is an open file descriptor of tensor.file. `source_index` is integers, then at most one slice of step 1: a part that
    is contiguous in the file.
    """
    dtype = DTYPES[tensor.dtype]
    start, remaining = 0, math.prod(tensor.shape)
    for axis, step in enumerate(source_index):
        remaining //= tensor.shape[axis]
        start += (step.start if isinstance(step, slice) else step) * remaining
    position = tensor.offset + start * dtype.itemsize
    flat = out.reshape(-1)
    if out.dtype == dtype:
        _read_bytes(handle, tensor, position, flat)
        return
    block = np.empty(min(flat.size, CONVERTED_AT_ONCE), dtype)
    for first in range(0, flat.size, CONVERTED_AT_ONCE):
        part = block[: flat.size - first]
        _read_bytes(handle, tensor, position + first * dtype.itemsize, part)
        flat[first : first + part.size] = part


def make_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file that holds `tensors` (key -> dtype, shape) one after the other, in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    position = 0
    for key, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers start at a multiple of eight
    return len(header).to_bytes(8, "little") + header


def _read_bytes(handle: int, tensor: Tensor, position: int, out: np.ndarray) -> None:
    """Fills `out` with the bytes of the file from `position` on."""
    buffer = out.view(np.uint8).data
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], position + done)
        if count == 0:
            raise UserError(f"{tensor.file} ended while it was read; it is truncated, copy or download it again")
        done += count
