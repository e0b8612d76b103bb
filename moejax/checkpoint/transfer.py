"""Copies the pieces of a source into a checkpoint with a few threads, so that a killed copy goes on where it was.

A journal beside the checkpoint being written holds one line for each piece that is in its files, with their checksums. The next run
of the same conversion reads those files back, keeps what is right, and copies the rest; so it ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moejax.checkpoint.manifest import FileSum, check_sums
from moejax.checkpoint.names import Piece
from moejax.checkpoint.source import Source
from moejax.checkpoint.stream import ArrayLayout, open_array, view_codes, write_piece
from moejax.config import UserError
from moejax.families.layout import Path as TreePath

THREADS = 4  # each holds one piece; enough to read, check and write at once
KEPT_BYTES = 1 << 27
HASHED_AT_ONCE = 1 << 22


class Busy(UserError):
    """Another process is at the same conversion."""


class Journal:
    """What of a conversion is done: the sums of each piece's files, the hashes of source files. One process holds it at a time."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Opens or begins the journal at `path`; `is_resumed` says whether it was of this same conversion.

        Raises Busy where another process holds it.
        """
        self.pieces: dict[int, dict[str, FileSum]] = {}
        self.hashes: dict[str, str] = {}
        self.path = path
        self._lock = threading.Lock()
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise Busy(f"another process is converting in {path.parent}; wait for it, or give another destination") from error
        self.is_resumed = self._read(fingerprint)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, fingerprint: str) -> None:
        """Empties the journal for a new conversion."""
        self.pieces.clear()
        self.hashes.clear()
        self._file.truncate(0)
        self._append({"fingerprint": fingerprint})

    def add_piece(self, number: int, sums: dict[str, FileSum]) -> None:
        """Notes that piece `number` lies whole in these files."""
        self.pieces[number] = sums
        self._append({"piece": number, "files": [[name, entry.bytes, entry.crc32] for name, entry in sums.items()]})

    def add_hash(self, name: str, value: str) -> None:
        """Notes the hash of a source file."""
        self.hashes[name] = value
        self._append({"hash": value, "of": name})

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(entry).encode() + b"\n")

    def _read(self, fingerprint: str) -> bool:
        """Takes in what an earlier run noted; a line that it was killed in is dropped."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        try:
            entries = [json.loads(line) for line in whole.splitlines()]
            if not entries or entries[0] != {"fingerprint": fingerprint}:
                return False
            for entry in entries[1:]:
                if "piece" in entry:
                    self.pieces[entry["piece"]] = {name: FileSum(size, crc) for name, size, crc in entry["files"]}
                else:
                    self.hashes[entry["of"]] = entry["hash"]
        except (ValueError, KeyError, TypeError):
            return False
        return True


class Progress:
    """Says on `stream` how far a copy is: bytes, rate and time left; one line that renews itself, or on a file one every ten seconds."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self.what, self.total, self.done, self.skipped = what, total, 0, 0
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._started = self._said = time.monotonic()

    def add(self, count: int, is_new: bool = True) -> None:
        """`count` bytes more are done; what an earlier run had done does not count for the rate."""
        with self._lock:
            self.done += count
            self.skipped += 0 if is_new else count
            now = time.monotonic()
            if now - self._said >= (0.5 if self._stream.isatty() else 10):
                self._said = now
                self._say(now - self._started)

    def _say(self, seconds: float) -> None:
        rate = max(self.done - self.skipped, 1) / max(seconds, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - self.done) / rate))
        text = f"{self.what} {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left} left"
        self._stream.write(f"\r{text} " if self._stream.isatty() else f"{text}\n")
        self._stream.flush()

    def finish(self) -> None:
        """Ends the line."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def copy_pieces(source: Source, layouts: dict[TreePath, ArrayLayout], directory: Path, journal: Journal, progress: Progress) -> None:
    """Writes all pieces of `source` into `directory`, and hashes its files, as far as `journal` does not say that it is done.

    Memory: THREADS pieces. Raises UserError, naming tensor and file, for a number that is NaN or infinite and for what cannot be read.
    """
    buffers = threading.local()

    def copy(number: int, piece: Piece) -> None:
        layout = layouts[piece.path]
        out = _take_buffer(buffers, piece, layout.dtype)
        if number in journal.pieces and _is_whole(directory, journal.pieces[number]):
            progress.add(out.nbytes, is_new=False)
            return
        with _reading(source, piece):
            source.read_into(piece, out)
        try:
            journal.add_piece(number, write_piece(directory, layout, piece.index, out))
        except ValueError as error:
            as_what = "" if layout.dtype == source.dtypes[piece.path] else f", as {layout.dtype.name}"
            raise UserError(
                f"{source.file_of(piece)}: tensor {piece.key} holds a number that is {error}{as_what}; the weights are damaged, "
                "copy or download them again"
            ) from error
        progress.add(out.nbytes)

    def hash_file(file: Path) -> None:
        journal.add_hash(source.label(file), _hash_file(file))

    hashed = set(journal.hashes)

    def tasks() -> Iterable[tuple[Callable[..., None], tuple[Any, ...]]]:
        # A file is hashed while its pieces are copied: both need it, and it is read from the disk once.
        for number, piece in enumerate(source.pieces):
            file = source.file_of(piece)
            if source.label(file) not in hashed:
                hashed.add(source.label(file))
                yield hash_file, (file,)
            yield copy, (number, piece)
        for file in source.files:
            if source.label(file) not in hashed:
                yield hash_file, (file,)

    _run_all(tasks())


def compare_pieces(source: Source, layouts: dict[TreePath, ArrayLayout], directory: Path, progress: Progress) -> None:
    """Reads every piece again from `source` and from the written arrays. Raises UserError, naming the tensor, where a bit differs."""
    buffers = threading.local()
    arrays = {path: open_array(directory, layout) for path, layout in layouts.items()}

    def compare(piece: Piece) -> None:
        out = _take_buffer(buffers, piece, layouts[piece.path].dtype)
        with _reading(source, piece):
            source.read_into(piece, out)
        stored = arrays[piece.path][piece.index].read().result()
        if stored.dtype != out.dtype or not np.array_equal(view_codes(np.ascontiguousarray(stored)), view_codes(out)):
            raise UserError(
                f"{'/'.join(piece.path)}{list(piece.index)} is not what {piece.key} of {source.file_of(piece)} holds; convert again"
            )
        progress.add(out.nbytes)

    _run_all((compare, (piece,)) for piece in source.pieces)


def _take_buffer(buffers: threading.local, piece: Piece, dtype: np.dtype) -> np.ndarray:
    """An array for a piece, in memory that the thread keeps: fresh memory costs as much as the reading.

    The largest ones are few, and would make every thread that met one keep as much to the end.
    """
    needed = math.prod(piece.shape) * dtype.itemsize
    if needed > KEPT_BYTES:
        return np.empty(piece.shape, dtype)
    if getattr(buffers, "memory", None) is None or buffers.memory.size < needed:
        buffers.memory = None
        buffers.memory = np.empty(needed, np.uint8)
    return buffers.memory[:needed].view(dtype).reshape(piece.shape)


@contextlib.contextmanager
def _reading(source: Source, piece: Piece) -> Iterator[None]:
    """Turns what the file system says of a file of the source into a message that names tensor and file."""
    try:
        with np.errstate(over="ignore"):  # what does not fit the new dtype becomes infinite, which is looked for afterwards
            yield
    except OSError as error:
        raise UserError(f"{source.file_of(piece)}: tensor {piece.key} cannot be read ({error}); copy or download it again") from error


def _is_whole(directory: Path, sums: dict[str, FileSum]) -> bool:
    try:
        check_sums(directory, sums)
    except UserError:
        return False
    return True


def _hash_file(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(HASHED_AT_ONCE)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _run_all(tasks: Iterable[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """Runs the tasks in THREADS threads, begun in their order; the first error stops the rest and is raised."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        futures: list[Future[None]] = [pool.submit(function, *arguments) for function, arguments in tasks]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
