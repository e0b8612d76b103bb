"""Writes an entry of the cache: appended to as tokens come, good up to its last commit whatever happens, whole once finished."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moejax.data.cache import HELD_OUT, IDS, INDEX, OFFSETS, PROGRESS, Entry, read_sealed, remove_entry, write_sealed
from moejax.data.documents import Document

COMMIT_BYTES = 32_000_000  # of text; what a killed `prepare` may have to do again


class EntryWriter:
    """An entry being made in `directory`, which goes on behind the last commit of one that was stopped.

    The caller holds the entry's lock. `documents`, `tokens` and `bytes` (of text, UTF-8) count what is in it.
    """

    def __init__(self, directory: Path, key: str, dtype: np.dtype):
        self.directory, self.key, self.dtype = directory, key, dtype
        directory.mkdir(parents=True, exist_ok=True)
        done = self._find_progress()
        self.documents, self.tokens, self.bytes = done["documents"], done["tokens"], done["bytes"]
        self._crc = dict(done["crc32"])
        self._uncommitted = 0
        self._files = {name: (directory / name).open("r+b" if done["tokens"] else "w+b") for name in (IDS, OFFSETS)}
        self._committed = self._sizes() if self.tokens else {}
        for name, size in self._committed.items():
            self._files[name].truncate(size)
            self._files[name].seek(size)
        if not self._committed:
            self._write(OFFSETS, np.zeros(1, "<i8"))

    def _sizes(self) -> dict[str, int]:
        return {IDS: self.tokens * self.dtype.itemsize, OFFSETS: 8 * (self.documents + 1)}

    def _find_progress(self) -> dict[str, Any]:
        """What an earlier process committed, as far as the files still have it; else nothing."""
        done = read_sealed(self.directory / PROGRESS)
        if done is not None and done["key"] == self.key and done["dtype"] == self.dtype.str:
            sizes = {IDS: done["tokens"] * self.dtype.itemsize, OFFSETS: 8 * (done["documents"] + 1)}
            paths = {self.directory / name: size for name, size in sizes.items()}
            if all(path.exists() and path.stat().st_size >= size for path, size in paths.items()):
                return done
        return {"documents": 0, "tokens": 0, "bytes": 0, "crc32": {IDS: 0, OFFSETS: 0}}

    def _write(self, name: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._files[name].write(data)
        self._crc[name] = zlib.crc32(data, self._crc[name])

    def append(self, ids: np.ndarray, sizes: np.ndarray, text_bytes: int) -> None:
        """Adds whole documents: their ids, the size of each, and the bytes of text they are. Commits every COMMIT_BYTES."""
        self._write(IDS, ids.astype(self.dtype, copy=False))
        self._write(OFFSETS, (self.tokens + np.cumsum(sizes, dtype=np.int64)).astype("<i8", copy=False))
        self.documents += len(sizes)
        self.tokens += len(ids)
        self.bytes += text_bytes
        self._uncommitted += text_bytes
        if self._uncommitted >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Makes what was added last over any end of this process."""
        self._sync()
        done = {"key": self.key, "dtype": self.dtype.str, "documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        write_sealed(self.directory / PROGRESS, {**done, "crc32": self._crc})
        self._committed, self._uncommitted = self._sizes(), 0

    def _sync(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def finish(self, held_out: Sequence[Document], **told: Any) -> Entry:
        """Writes the held-out text and, last, the index with what else is to be told; the entry is then whole."""
        self._sync()
        text = b"".join(json.dumps(asdict(document)).encode() + b"\n" for document in held_out)
        with (self.directory / HELD_OUT).open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sizes = {**self._sizes(), HELD_OUT: len(text)}
        checksums = {**self._crc, HELD_OUT: zlib.crc32(text)}
        index = {
            "key": self.key,
            "dtype": self.dtype.str,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "held_out_documents": len(held_out),
            "held_out_bytes": sum(len(document.text.encode()) for document in held_out),
            "files": {name: {"bytes": size, "crc32": checksums[name]} for name, size in sizes.items()},
            **told,
        }
        write_sealed(self.directory / INDEX, index)
        (self.directory / PROGRESS).unlink(missing_ok=True)
        return Entry(self.directory, self.key, index)

    def close(self) -> None:
        """Lets go of the files. Of an entry that is not finished the last commit stays, and nothing else."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer; the commit does not count it
                file.close()
        if (self.directory / INDEX).exists():
            return
        for name, size in self._committed.items():
            with contextlib.suppress(OSError):
                os.truncate(self.directory / name, size)
        if not self._committed:
            remove_entry(self.directory)

    def abandon(self) -> None:
        """Removes the unfinished entry, commits and all: nothing could go on with it."""
        self._committed = {}
