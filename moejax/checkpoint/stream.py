"""Writes stacked arrays piece by piece, in the form that Orbax restores; the only file that knows that form, which is Orbax's own.

Each array is an uncompressed zarr (version 2) array in a directory of its own, named as Orbax names it (`layers.block_0.moe.up.kernel`),
and each of its chunks is one plain file of numbers. So a piece can be written, summed and written again alone, and no stacked array
ever exists in memory. Chunks hold one layer and one expert, and are cut along both widths, either of which may be sharded over
devices: a process reads little more than its own part. tests/checkpoint/test_stream.py holds this file to the installed Orbax.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.manifest import FileSum, sum_bytes

LARGEST_CHUNK = 16_000_000  # bytes; a 14,336 x 4,096 expert in bfloat16 becomes eight
SYNCED_AT_ONCE = 1_000_000  # bytes; larger files are on the disk when written, which spreads the waiting over the threads
_ZARR_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16"}
_CODES = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
_EXPONENTS = {"float32": (0x7FFFFFFF, 0x7F800000), "float16": (0x7FFF, 0x7C00), "bfloat16": (0x7FFF, 0x7F80)}
_SCANNED_AT_ONCE = 1 << 17  # numbers; they stay in the processor's cache between the two passes over them


@dataclass(frozen=True)
class ArrayLayout:
    """One array on disk: its folder, shape and dtype, and the shape of its chunks, the last axes of which are those of a piece."""

    folder: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]


def plan_array(path: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype, stacked: int) -> ArrayLayout:
    """The layout of the array at `path` of the tree; its first `stacked` axes are those that pieces are indexed by."""
    chunks = [*[1] * stacked, *shape[stacked:]]
    while math.prod(chunks) * dtype.itemsize > LARGEST_CHUNK:
        # In as few equal parts as can be, and the longer side first, so that chunks become square: nobody knows yet which is sharded.
        parts, _, side = min((_smallest_divisor(chunks[axis]), -chunks[axis], axis) for axis in range(stacked, len(shape)))
        chunks[side] //= parts
    return ArrayLayout(".".join(path), shape, dtype, tuple(chunks))


def _smallest_divisor(length: int) -> int:
    """The smallest divisor above 1; of 1 itself, what is chosen last."""
    return next((parts for parts in range(2, length + 1) if length % parts == 0), 1 << 62)


def write_descriptions(directory: Path, layouts: Mapping[tuple[str, ...], ArrayLayout]) -> None:
    """Writes all of a saved tree but its numbers: what Orbax and zarr say of the arrays."""
    tree = {}
    for path, layout in layouts.items():
        folder = directory / layout.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".zarray").write_text(json.dumps(_describe_array(layout)), encoding="utf-8")
        tree[str(path)] = {
            "key_metadata": [{"key": name, "key_type": 2} for name in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (directory / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")
    handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    about = {"item_handlers": handler, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(about), encoding="utf-8")
    (directory / "commit_success.txt").write_text("committed\n", encoding="utf-8")  # Orbax's mark on object stores


def _describe_array(layout: ArrayLayout) -> dict[str, Any]:
    return {
        "chunks": list(layout.chunks),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _ZARR_DTYPES[layout.dtype.name],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(layout.shape),
        "zarr_format": 2,
    }


def list_chunks(layout: ArrayLayout, index: tuple[int, ...]) -> dict[str, tuple[slice, ...]]:
    """The files of the piece at `index` (below the checkpoint's folder of arrays) -> the part of the piece that each holds."""
    chunks = layout.chunks[len(index) :]
    counts = [length // chunk for length, chunk in zip(layout.shape[len(index) :], chunks, strict=True)]
    files = {}
    for place in itertools.product(*map(range, counts)):
        name = ".".join(map(str, (*index, *place)))
        files[f"{layout.folder}/{name}"] = tuple(slice(p * size, (p + 1) * size) for p, size in zip(place, chunks, strict=True))
    return files


def write_piece(directory: Path, layout: ArrayLayout, index: tuple[int, ...], piece: np.ndarray) -> dict[str, FileSum]:
    """Writes the numbers at `index` of an array; returns the sums of the files. Raises ValueError for any that is NaN or infinite.

    Memory: one chunk beside the piece. May run in several threads at once, for different pieces.
    """
    numbers = view_codes(piece)  # copying bfloat16 as such is many times slower
    chunk = np.empty(layout.chunks[len(index) :], numbers.dtype)  # one for all: memory taken and given back at once piles up
    sums = {}
    for name, part in list_chunks(layout, index).items():
        np.copyto(chunk, numbers[part])
        if not is_finite(chunk, layout.dtype):
            raise ValueError("NaN or infinite")
        data = chunk.reshape(-1).view(np.uint8).data
        _write_file(directory / name, data)
        sums[name] = sum_bytes(data)
    return sums


def view_codes(array: np.ndarray) -> np.ndarray:
    """The array as unsigned integers of the same width: compares and copies bit by bit."""
    return array.view(_CODES[array.dtype.itemsize])


def is_finite(codes: np.ndarray, dtype: np.dtype) -> bool:
    """Whether none of the contiguous `codes`, the bits of numbers of `dtype`, is NaN or infinite: their exponent is then all ones."""
    magnitude, infinite = _EXPONENTS[dtype.name]
    flat = codes.reshape(-1)
    block = np.empty(min(flat.size, _SCANNED_AT_ONCE), flat.dtype)
    for first in range(0, flat.size, _SCANNED_AT_ONCE):
        part = flat[first : first + _SCANNED_AT_ONCE]
        if np.bitwise_and(part, magnitude, out=block[: part.size]).max() >= infinite:
            return False
    return True


def _write_file(path: Path, data: memoryview) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        done = 0
        while done < len(data):
            done += os.write(handle, data[done:])
        if done > SYNCED_AT_ONCE:
            os.fsync(handle)
    finally:
        os.close(handle)


def open_array(directory: Path, layout: ArrayLayout) -> Any:
    """The array as tensorstore reads it, from its own description: what is written is checked with other eyes than the writer's."""
    import tensorstore

    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory / layout.folder}/"}}
    return tensorstore.open(spec, read=True, context=tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})).result()
