"""The manifest of a checkpoint: size and checksum of every file, so that no truncated, missing, extra or flipped one passes.

    manifest.json   {"format": 1, "files": {"params/...": {"bytes": ..., "crc32": "..."}}}: every file but the two that follow it
    moejax.json     written last; holds the manifest's own size and checksum, and a checksum of itself

CRC-32 finds every flip of one bit and every burst shorter than 32, at 4 GB/s a core; it is no defence against a forger. Orbax checks
nothing itself: flipped bits come back as wrong numbers.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.config import UserError
from moejax.files import measure_file

METADATA = "moejax.json"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
READERS = min(8, 2 * (os.cpu_count() or 1))  # reading waits for the disk, and checksums run outside the interpreter's lock
_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{8})"')


class DamagedCheckpoint(UserError):
    """A checkpoint is not what was written: `path`, a file or folder of it, `what` is wrong with it. Another checkpoint will do."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}; use another copy of the checkpoint, or another checkpoint")
        self.path, self.what = path, what

    def describe(self, directory: Path) -> str:
        """What is wrong, the file named as it lies in the checkpoint `directory`."""
        inside = self.path.relative_to(directory) if self.path.is_relative_to(directory) else self.path
        return self.what if inside == Path() else f"{inside.as_posix()} {self.what}"


@dataclass(frozen=True)
class FileSum:
    """Size and CRC-32 of one file."""

    bytes: int
    crc32: str


def sum_bytes(data: Any) -> FileSum:
    """The sum of a file that holds `data`, a bytes-like object."""
    return FileSum(memoryview(data).nbytes, f"{zlib.crc32(data):08x}")


def sum_file(path: Path) -> FileSum:
    """Reads a file and sums it, with a few MiB of memory."""
    size, crc = measure_file(path)
    return FileSum(size, f"{crc:08x}")


def list_files(directory: Path) -> list[str]:
    """The files below `directory`, as sorted relative paths with slashes."""
    found = []
    for folder, _, names in os.walk(directory):
        inside = Path(folder).relative_to(directory)
        found += [(inside / name).as_posix() for name in names]
    return sorted(found)


def write_manifest(directory: Path, metadata: Mapping[str, Any], known: Mapping[str, FileSum] | None = None) -> None:
    """Completes a checkpoint: manifest.json over all that lies in `directory`, then moejax.json with `metadata`, the mark of a whole one.

    `known` are the sums of files that were summed while they were written; the others are read.
    """
    sums = dict(known or {})
    rest = [name for name in list_files(directory) if name not in sums and name not in (MANIFEST, METADATA)]
    with ThreadPoolExecutor(READERS) as pool:
        sums |= zip(rest, pool.map(lambda name: sum_file(directory / name), rest), strict=True)
    files = {name: {"bytes": entry.bytes, "crc32": entry.crc32} for name, entry in sorted(sums.items())}
    manifest = json.dumps({"format": MANIFEST_FORMAT, "files": files}, indent=0) + "\n"
    (directory / MANIFEST).write_bytes(manifest.encode())
    own = sum_bytes(manifest.encode())
    seal_metadata(directory, {**metadata, "manifest": {"bytes": own.bytes, "crc32": own.crc32}})


def seal_metadata(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes moejax.json with a checksum of its own text, in which the checksum itself counts as zeros."""
    text = (json.dumps({**values, "checksum": "0" * 8}, indent=2) + "\n").encode()
    (directory / METADATA).write_bytes(_put_checksum(text, f"{zlib.crc32(text):08x}"))


def read_sealed(path: Path) -> dict[str, Any]:
    """The values of a moejax.json whose text is what was written. Raises ValueError for any other, FileNotFoundError for none."""
    text = path.read_bytes()
    values = json.loads(text)
    found = _CHECKSUM.findall(text)
    if not found or f"{zlib.crc32(_put_checksum(text, '0' * 8)):08x}".encode() != found[-1]:
        raise ValueError("its checksum does not fit its text")
    return values


def holds_checksum(text: bytes) -> bool:
    """Whether the text of a moejax.json ends with a checksum, be it right or wrong."""
    return _CHECKSUM.search(text) is not None


def _put_checksum(text: bytes, checksum: str) -> bytes:
    """The text with its last checksum replaced: the own one, which is written at the end."""
    places = list(_CHECKSUM.finditer(text))
    if not places:
        return text
    first, end = places[-1].span(1)
    return text[:first] + checksum.encode() + text[end:]


def check_files(
    directory: Path, manifest_sum: Mapping[str, Any], inside: str | None = None, share: tuple[int, int] = (0, 1)
) -> dict[str, FileSum]:
    """Raises DamagedCheckpoint, naming the file, unless the files of `directory` are those of its manifest, byte by byte.

    Names and sizes are compared for all of them; contents are read for those below the folder `inside` (None: all) and at the top.
    `share` (i, n) reads every n-th of them, from the i-th on: n processes that start together divide the work. `manifest_sum` is what
    moejax.json says of the manifest. Hidden files at the top, which file managers and downloaders leave, are not looked at.
    """
    expected = _read_manifest(directory, manifest_sum)
    found = set(list_files(directory)) - {MANIFEST, METADATA}
    extra = sorted(name for name in found - expected.keys() if not name.startswith("."))
    missing = sorted(expected.keys() - found)
    if missing:
        raise DamagedCheckpoint(directory / missing[0], f"is missing{_others(missing)}")
    if extra:
        raise DamagedCheckpoint(directory / extra[0], f"is not in the checkpoint's {MANIFEST}{_others(extra)}: take it out")
    for name, entry in expected.items():
        size = (directory / name).stat().st_size
        if size != entry.bytes:
            what = "truncated" if size < entry.bytes else "damaged"
            raise DamagedCheckpoint(directory / name, f"is {what}: it holds {size:,} bytes, {MANIFEST} says {entry.bytes:,}")
    names = [name for name in expected if inside is None or "/" not in name or name.startswith(f"{inside}/")]
    check_sums(directory, {name: expected[name] for name in names[share[0] :: share[1]]})
    return expected


def check_sums(directory: Path, expected: Mapping[str, FileSum]) -> None:
    """Reads these files, several at a time. Raises DamagedCheckpoint, naming the first that is not as expected."""
    _in_parallel(lambda name: _check_sum(directory / name, expected[name]), expected)


def _check_sum(path: Path, expected: FileSum) -> None:
    try:
        found = sum_file(path)
    except OSError as error:
        raise DamagedCheckpoint(path, f"cannot be read ({error.strerror})") from error
    if found != expected:
        raise DamagedCheckpoint(path, f"is damaged: its checksum is {found.crc32}, {MANIFEST} says {expected.crc32}")


def _in_parallel(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Calls `function` for each name, a few at a time; the first error ends it."""
    pool = ThreadPoolExecutor(READERS)
    try:
        for _ in pool.map(function, names):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _read_manifest(directory: Path, manifest_sum: Mapping[str, Any]) -> dict[str, FileSum]:
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(path, "is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(path, f"cannot be read ({error.strerror})") from error
    if vars(sum_bytes(text)) != manifest_sum:
        raise DamagedCheckpoint(path, f"is damaged: it is not the one that {METADATA} names")
    values = json.loads(text)
    return {name: FileSum(entry["bytes"], entry["crc32"]) for name, entry in values["files"].items()}


def _others(names: list[str]) -> str:
    return f", and {len(names) - 1} other files like it" if len(names) > 1 else ""
