"""Tokens on disk: one directory, an entry, for each source tokenised by one tokenizer; whole, or not taken for one.

    <cache>/<key>/ids.bin         token ids of all training documents one after another, uint16 or uint32, little endian
                  offsets.bin     where each document begins, int64, and the end of the last
                  held_out.jsonl  the held-out documents, {"name": ..., "text": ...} a line
                  index.json      what they are; size and CRC-32 of each file; its own CRC-32. Written last: without it, an unfinished entry
                  progress.json   of an unfinished entry: how far the files are good

The key says nothing of the length of rows, on purpose: a row is a view of the stream, and another length is another view.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import DataConfig, UserError
from moejax.data.documents import Document
from moejax.data.rows import Rows
from moejax.files import FULL_DISK_ERRORS, measure_file, write_file
from moejax.launch import user_cache

FORMAT_VERSION = 1  # of the files above and of what reading the same source yields
IDS, OFFSETS, HELD_OUT, INDEX, PROGRESS = "ids.bin", "offsets.bin", "held_out.jsonl", "index.json", "progress.json"
ALWAYS_VERIFIED = 4 * 10**9  # bytes; an entry up to this size is compared with its checksums at every start of a run

Log = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A whole entry: its directory, its key, and its index (tokens, documents, bytes, held_out_documents, files, ...)."""

    directory: Path
    key: str
    index: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Ids of all training documents."""
        return self.index["tokens"]

    @property
    def checksum(self) -> str:
        """What two entries of the same tokens and held-out text share."""
        return "-".join(f"{self.index['files'][name]['crc32']:08x}" for name in (IDS, OFFSETS, HELD_OUT))

    def rows(self, sequence_length: int) -> Rows:
        """The training documents as rows, from the files on disk; nothing of their size is held in memory."""
        ids = np.memmap(self.directory / IDS, self.index["dtype"], mode="r") if self.tokens else np.zeros(0, np.int32)
        return Rows(ids, np.memmap(self.directory / OFFSETS, "<i8", mode="r"), sequence_length)

    def held_out(self) -> list[Document]:
        """The held-out documents, in their order."""
        lines = (self.directory / HELD_OUT).read_bytes().splitlines()
        return [Document(**json.loads(line)) for line in lines]


def find_cache(data: DataConfig) -> Path:
    """Where tokens are kept: data.cache_dir, else $MOEJAX_CACHE, else ~/.cache/moejax."""
    return Path(data.cache_dir).expanduser() if data.cache_dir else user_cache()


def make_key(description: Any) -> str:
    """The key of what a JSON value describes."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, description], sort_keys=True).encode()).hexdigest()[:32]


def find_entry(root: Path, key: str, log: Log | None = None, verify: bool | None = None) -> Entry | None:
    """The whole entry of a key; None where there is none, or a broken one.

    Sizes are always compared; checksums where `verify`, None: where the entry is not larger than ALWAYS_VERIFIED. A caller that holds
    the entry's lock gives a `log`: a broken entry is told there, and removed. Without the lock, another process may be making it anew.
    """
    directory = root / key
    try:
        index = _unseal((directory / INDEX).read_bytes())
        if index["key"] != key:
            raise ValueError(f"{INDEX} is that of another entry")
        files = index["files"]
        if verify is None:
            verify = sum(file["bytes"] for file in files.values()) <= ALWAYS_VERIFIED
        for name, file in files.items():
            size = (directory / name).stat().st_size
            if size != file["bytes"]:
                raise ValueError(f"{name} has {size:,} bytes; expected {file['bytes']:,}")
            if verify and measure_file(directory / name)[1] != file["crc32"]:
                raise ValueError(f"{name} is not what was written; its checksum differs")
        return Entry(directory, key, index)
    except FileNotFoundError as error:
        if not (directory / INDEX).exists():
            return None  # never finished
        reason = f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
    if log is not None:
        log(f"the kept tokens in {str(directory)!r} are broken ({reason}); making them again")
        remove_entry(directory)
    return None


def remove_entry(directory: Path) -> None:
    """Removes an entry; a process that reads it goes on reading what it has open. The index goes first: it is no entry any more."""
    with contextlib.suppress(FileNotFoundError):
        (directory / INDEX).unlink()
    shutil.rmtree(directory, ignore_errors=True)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON with a checksum of itself, whole or not at all, and syncs it."""
    content = json.dumps(values, sort_keys=True)
    write_file(path, json.dumps({"crc32": zlib.crc32(content.encode()), "content": values}, sort_keys=True), sync=True)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None where there is nothing or something else."""
    try:
        return _unseal(path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _unseal(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
        content = values["content"]
        whole = values["crc32"] == zlib.crc32(json.dumps(content, sort_keys=True).encode())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{INDEX} is not whole") from error
    if not whole:
        raise ValueError(f"{INDEX} is not what was written; its checksum differs")
    return content


@contextlib.contextmanager
def lock_entry(root: Path, key: str, log: Log) -> Iterator[None]:
    """Only one process of a machine is inside for a key at a time; the others wait, and are told so once."""
    import fcntl

    with (root / f"{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that prepares the same tokens in {str(root / key)!r}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def explain_writing(root: Path) -> Iterator[None]:
    """Turns the errors of a cache that cannot be written to, or has no room, into UserErrors."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in FULL_DISK_ERRORS:
            raise UserError(
                f"no room for tokens in {str(root)!r} ({error.strerror}); what is finished there is unchanged; make room and give the same "
                "command again, which goes on where it stopped, or name another place with MOEJAX_CACHE or --data.cache-dir"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise UserError(
                f"cannot keep tokens in {str(root)!r} ({error.strerror}); name a directory that can be written to with MOEJAX_CACHE or "
                "--data.cache-dir"
            ) from error
        raise
