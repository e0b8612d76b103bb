"""Reads parts of the arrays of a saved checkpoint, so that a model can be written elsewhere without ever being in memory whole.

Orbax itself restores whole arrays; the files below it are read here with tensorstore, as `_METADATA` describes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import UserError

TreePath = tuple[str, ...]


class StoredSlices:
    """The arrays in the folder `directory` of a checkpoint by tree path: shapes, dtypes, and parts of them.

    Arrays are stored in chunks, which can only be read whole; the last block of chunks read is kept, so that reading parts in the
    order of `block_of` reads each chunk once. Memory: one block. Raises UserError, naming the place, for what cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        import tensorstore

        self._directory = directory
        self._tensorstore = tensorstore
        self._arrays: dict[TreePath, Any] = {}
        self._held: tuple[TreePath, tuple[int, ...]] | None = None
        self._block = np.empty(0)
        try:
            description = json.loads((directory / "_METADATA").read_bytes())
            self._is_ocdbt, self._is_zarr3 = bool(description["use_ocdbt"]), bool(description.get("use_zarr3"))
            names = [tuple(part["key"] for part in leaf["key_metadata"]) for leaf in description["tree_metadata"].values()]
            for name in names:
                self._arrays[name] = self._open(".".join(name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error

    def _open(self, name: str) -> Any:
        base = self._directory.absolute().as_uri()
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if self._is_ocdbt else f"{base}/{name}/"
        context = self._tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        spec = {"driver": "zarr3" if self._is_zarr3 else "zarr", "kvstore": store}
        return self._tensorstore.open(spec, read=True, open=True, context=context).result()

    def shapes(self) -> dict[TreePath, tuple[int, ...]]:
        """The shape of every array."""
        return {path: tuple(array.shape) for path, array in self._arrays.items()}

    def dtype(self, path: TreePath) -> np.dtype:
        """The dtype of an array."""
        return self._arrays[path].dtype.numpy_dtype

    def block_of(self, path: TreePath, index: tuple[int, ...]) -> tuple[int, ...]:
        """Which block of chunks `index` (into the first axes) lies in: reading in the order of blocks reads every chunk once."""
        chunk = self._arrays[path].chunk_layout.read_chunk.shape
        return tuple(place // chunk[axis] for axis, place in enumerate(index))

    def read(self, path: TreePath, index: tuple[int, ...]) -> np.ndarray:
        """`array[index]` in its stored dtype; valid until the next read."""
        block, chunk = self.block_of(path, index), self._arrays[path].chunk_layout.read_chunk.shape
        if self._held != (path, block):
            self._held, self._block = None, np.empty(0)  # first, so that two are never held
            part = tuple(slice(b * chunk[axis], (b + 1) * chunk[axis]) for axis, b in enumerate(block))
            limits = tuple(slice(s.start, min(s.stop, length)) for s, length in zip(part, self._arrays[path].shape, strict=False))
            try:
                array = self._arrays[path]
                self._block = (array[limits] if limits else array).read().result()
            except (OSError, ValueError) as error:
                raise self._damaged(error) from error
            self._held = (path, block)
        return self._block[tuple(place - b * chunk[axis] for axis, (place, b) in enumerate(zip(index, block, strict=True)))]

    def _damaged(self, error: Exception) -> UserError:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        return UserError(f"{self._directory} is damaged: its arrays cannot be read ({reason}); use another checkpoint")
