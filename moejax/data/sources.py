"""Where a domain's text lies: its files, or a builtin source; and its documents, in an order fixed by their names and the seed.

`builtin:prose` and `builtin:code` read what every machine that runs this project already has: the standard library and the
packages the project depends on. They are read in place, so nothing is downloaded and nothing of theirs is copied into the
project. `builtin:sql` and `builtin:passkey` are synthetic (`moejax.data.sql`, `moejax.data.passkey`). A new builtin source is one function
and one line in `BUILTIN`.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.config import Domain, UserError
from moejax.data import hub_text, passkey, python_text, sql
from moejax.data.documents import Document, Reading, cut_bytes, stable_key
from moejax.data.formats import KNOWN_FILES, find_format, read_file

PROSE_PACKAGES = ("jax", "flax", "optax", "orbax", "grain", "numpy")
DEFAULT_MEGABYTES = 8.0  # of builtin text, which may have no end, where nothing else is said
_BUILTIN_VERSION = 1  # of what the builtin sources make of the same packages
_DISTRIBUTIONS = {"orbax": "orbax-checkpoint"}  # where a package's name is not its distribution's


@dataclass(frozen=True)
class SourceFile:
    """A file of a domain: its name there, its format, its bytes, what changes with its content, and how to get it."""

    name: str
    text_format: str
    size: int
    stamp: str
    locate: Callable[[], Path]


def list_files(domain: Domain) -> list[SourceFile]:
    """The files that a domain's path names: one file, those under a directory (hidden ones left out), those of a pattern or a data set.

    A file that is named alone, or by a pattern with a format, is read whatever its name. Raises UserError where the path names nothing.
    """
    if domain.path.startswith(hub_text.PREFIX):
        return _list_hub(domain)
    root = Path(domain.path).expanduser()
    if root.is_dir():
        return sorted(_walk(domain, root, root), key=lambda file: file.name)
    if root.exists():
        text_format = domain.format if domain.format != "auto" else find_format(root.name) or "text"
        return [_source_file(root.name, root, text_format)]
    if glob.has_magic(domain.path):
        return _list_pattern(domain, root)
    raise UserError(
        f"data path {str(root)!r} does not exist; expected a file, a directory with {KNOWN_FILES}, a pattern with '*', or "
        "hf://datasets/OWNER/NAME"
    )


def _list_hub(domain: Domain) -> list[SourceFile]:
    repository, commit, files = hub_text.list_hub_files(domain.path)
    found = []
    for file in files:
        text_format = _choose_format(domain, file.name)
        if text_format is not None and not any(part.startswith(".") for part in Path(file.name).parts):
            found.append(
                SourceFile(
                    file.name, text_format, file.size, file.content,
                    lambda name=file.name: hub_text.fetch_hub_file(repository, commit, name),
                )
            )  # fmt: skip
    return found


def _list_pattern(domain: Domain, root: Path) -> list[SourceFile]:
    parts = root.parts
    base = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
    matches = sorted(glob.glob(str(root), recursive=True))
    if not matches:
        raise UserError(f"data path {domain.path!r} matches no file; check the pattern ('**' is any number of directories)")
    found: dict[str, SourceFile] = {}
    for match in map(Path, matches):
        if match.is_dir():
            files = _walk(domain, match, base)
        else:
            name = match.relative_to(base).as_posix()
            text_format = find_format(name) if domain.format == "auto" else domain.format
            files = [] if text_format is None else [_source_file(name, match, text_format)]
        found |= {file.name: file for file in files}
    return list(found.values())


def _walk(domain: Domain, folder: Path, base: Path) -> list[SourceFile]:
    found = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path, text_format = Path(place, name), _choose_format(domain, name)
            if text_format is not None and not name.startswith(".") and path.is_file():
                found.append(_source_file(path.relative_to(base).as_posix(), path, text_format))
    return found


def _choose_format(domain: Domain, name: str) -> str | None:
    """How a file among others is read; None: it is left out."""
    found = find_format(name)
    return found if domain.format in ("auto", found) else None


def _source_file(name: str, path: Path, text_format: str) -> SourceFile:
    status = path.stat()
    return SourceFile(name, text_format, status.st_size, str(status.st_mtime_ns), lambda: path)


def describe_source(domain: Domain) -> dict[str, Any]:
    """What changes when a domain's text does, as JSON: names, sizes and times of its files; versions of the packages it is read from.

    Raises UserError as `list_files` does.
    """
    if domain.builtin == "sql":
        return {"text": _BUILTIN_VERSION, "sqlite": sqlite3.sqlite_version, "python": sys.version}
    if domain.builtin == "passkey":
        return {"text": _BUILTIN_VERSION, "python": sys.version}
    if domain.builtin is not None:
        packages = PROSE_PACKAGES if domain.builtin == "prose" else ()
        return {"text": _BUILTIN_VERSION, "python": sys.version, "packages": {package: _version(package) for package in packages}}
    files = list_files(domain)
    listing = [(file.name, file.text_format, file.size, file.stamp) for file in files]
    place = domain.path if domain.path.startswith(hub_text.PREFIX) else str(Path(domain.path).expanduser().resolve())
    return {
        "place": place,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "listing": hashlib.sha256(json.dumps(listing).encode(errors="surrogateescape")).hexdigest(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return None


def read_documents(domain: Domain, max_bytes: int, seed: int, reading: Reading | None = None) -> Iterator[Document]:
    """The documents of a domain one by one, at most `max_bytes` UTF-8 bytes of them, in an order fixed by their names and the seed.

    Empty documents are left out, and counted in `reading`; the document that crosses the limit is cut at a line boundary.
    Raises UserError for text that cannot be read, unless `reading` says to leave such out, and where there is no text at all.
    """
    reading = Reading() if reading is None else reading
    left, found = max_bytes, False
    source = BUILTIN[domain.builtin](seed, reading) if domain.builtin is not None else _read_files(domain, seed, reading)
    if domain.builtin is not None:
        reading.total = max_bytes
    for document in source:
        data = document.text.encode()
        if len(data) > left:
            document = Document(document.name, cut_bytes(data, left).decode())
            left = 0
        else:
            left -= len(data)
        if document.text.strip():
            found = True
            yield document
        else:
            reading.empty += 1
        if domain.builtin is not None:
            reading.consumed = max_bytes - left
        if left <= 0:
            break
    if not found:
        raise UserError(_no_text(domain, max_bytes, reading))


def _read_files(domain: Domain, seed: int, reading: Reading) -> Iterator[Document]:
    files = sorted(list_files(domain), key=lambda file: (stable_key(file.name, seed), file.name))
    reading.total = sum(file.size for file in files)
    for file in files:
        yield from read_file(file.locate(), file.name, file.text_format, domain.text_field, reading)
        reading.finish_file(file.size)


def _shuffled(names: dict[str, Path], seed: int) -> list[tuple[str, Path]]:
    return sorted(names.items(), key=lambda item: (stable_key(item[0], seed), item[0]))


def _read_prose(seed: int, reading: Reading) -> Iterator[Document]:
    modules = python_text.standard_library_modules()
    for package in PROSE_PACKAGES:
        modules |= python_text.package_modules(package)
    seen: set[bytes] = set()
    for name, path in _shuffled(modules, seed):
        for part, text in python_text.read_prose(name, path, seen):
            yield Document(part, text)


def _read_code(seed: int, reading: Reading) -> Iterator[Document]:
    for name, path in _shuffled(python_text.standard_library_modules(), seed):
        text = python_text.read_code(path)
        if text:
            yield Document(name, text)


def _read_sql(seed: int, reading: Reading) -> Iterator[Document]:
    for index in itertools.count():
        yield Document(f"sql-{index:06d}", sql.generate_document(seed, index))


def _read_passkey(seed: int, reading: Reading) -> Iterator[Document]:
    for index in itertools.count():
        yield Document(f"passkey-{index:06d}", passkey.generate_document(seed, index))


BUILTIN: dict[str, Callable[[int, Reading], Iterator[Document]]] = {
    "prose": _read_prose, "code": _read_code, "sql": _read_sql, "passkey": _read_passkey,
}  # fmt: skip


def _no_text(domain: Domain, max_bytes: int, reading: Reading) -> str:
    found = f"no text found for data domain {domain.name!r}: looked for "
    if domain.builtin is None:
        bad = f" ({reading.bad:,} left out as bad, the first: {reading.first_bad})" if reading.bad else ""
        wanted = KNOWN_FILES if domain.format == "auto" else f"files of format {domain.format}"
        return f"{found}{wanted} with text in them in {domain.path!r}{bad}; point --data.path at a text file or at a directory with some"
    places = "the standard library" + (f" and the packages {', '.join(PROSE_PACKAGES)}" if domain.builtin == "prose" else "")
    return (
        f"{found}Python source of {places} under {python_text.standard_library_root()!r} (limit {max_bytes} bytes); "
        "where Python is installed without sources, set --data.path to your own text"
    )
