"""Named sources of text: from a data domain of the configuration to whole documents, in an order fixed by the seed.

`prose` and `code` read what every machine that runs this project already has: the standard library and the packages the
project depends on. They are read in place, so nothing is downloaded and nothing of theirs is copied into the project.
`sql` is synthetic (`moejax.data.sql`). `files` reads the user's own text. A new source is one function and one line in `SOURCES`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moejax.config import Domain, UserError
from moejax.data import python_text, sql

PROSE_PACKAGES = ("jax", "flax", "optax", "orbax", "grain", "numpy")
FILE_SUFFIXES = (".txt", ".md", ".py", ".sql", ".rst", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One whole text (a module, a file, a line of a JSONL file); `name` is unique in its domain and stable between runs."""

    name: str
    text: str


def stable_key(name: str, seed: int) -> int:
    """A 64-bit number that depends on the name and the seed alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def _shuffled(names: dict[str, Path], seed: int) -> list[tuple[str, Path]]:
    return sorted(names.items(), key=lambda item: (stable_key(item[0], seed), item[0]))


def _read_prose(domain: Domain, seed: int, max_bytes: int) -> Iterator[Document]:
    modules = python_text.standard_library_modules()
    for package in PROSE_PACKAGES:
        modules |= python_text.package_modules(package)
    seen: set[bytes] = set()
    for name, path in _shuffled(modules, seed):
        for part, text in python_text.read_prose(name, path, seen):
            yield Document(part, text)


def _read_code(domain: Domain, seed: int, max_bytes: int) -> Iterator[Document]:
    for name, path in _shuffled(python_text.standard_library_modules(), seed):
        text = python_text.read_code(path)
        if text:
            yield Document(name, text)


def _read_sql(domain: Domain, seed: int, max_bytes: int) -> Iterator[Document]:
    index = 0
    while True:
        yield Document(f"sql-{index:06d}", sql.generate_document(seed, index))
        index += 1


def _read_files(domain: Domain, seed: int, max_bytes: int) -> Iterator[Document]:
    root = Path(domain.path).expanduser()
    if not root.exists():
        suffixes = ", ".join(FILE_SUFFIXES)
        raise UserError(f"data path {str(root)!r} does not exist; expected a text file, or a directory with {suffixes} files")
    for name, path in _shuffled(_find_files(root), seed):
        yield from _read_file(name, path, max_bytes)


def _find_files(root: Path) -> dict[str, Path]:
    """Name -> file: the file itself, or the text files under a directory, hidden directories left out."""
    if not root.is_dir():
        return {root.name: root}
    found = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            path = Path(folder, file)
            if path.suffix.lower() in FILE_SUFFIXES and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return found


def describe_files(domain: Domain) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change) of the user's files in a domain: what tells that they are no longer what was read."""
    if domain.builtin is not None:
        return []
    files = sorted(_find_files(Path(domain.path).expanduser()).items())
    return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files if path.exists()]


def _read_file(name: str, path: Path, max_bytes: int) -> Iterator[Document]:
    """The documents of one file: the file, or every line of a JSONL file. At most about max_bytes are read from the disk."""
    if path.suffix.lower() == ".jsonl":
        yield from _read_json_lines(name, path)
        return
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}; fix its permissions or leave it out of the data path") from error
    if len(data) > max_bytes:
        data = cut_bytes(data, max_bytes)
    yield Document(name, _decode(data, path).replace("\r\n", "\n"))


def _read_json_lines(name: str, path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{str(path)!r} line {number}"
            text = _decode(line, path)
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f'{where} is not JSON ({error.msg}); expected one object a line, like {{"text": "..."}}') from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                got = f"the fields {', '.join(map(repr, record)) or 'none'}" if isinstance(record, dict) else f"a {type(record).__name__}"
                raise UserError(f"{where} has no text: got {got}; expected an object with a string in the field 'text'")
            try:
                record["text"].encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{where} has half a surrogate pair in its text, which is no character; write the character itself"
                ) from error
            yield Document(f"{name}:{number}", record["text"])


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert it to UTF-8 or leave it out of the data path"
        ) from error


SOURCES: dict[str, Callable[[Domain, int, int], Iterator[Document]]] = {
    "prose": _read_prose,
    "code": _read_code,
    "sql": _read_sql,
    "files": _read_files,
}
DEFAULT_MEGABYTES = 8.0  # of builtin text, which may have no end, where nothing else is said


def read_documents(domain: Domain, max_bytes: int, seed: int) -> list[Document]:
    """The documents of a domain, at most `max_bytes` UTF-8 bytes of them, in an order fixed by their names and the seed.

    Empty documents are left out; the document that crosses the limit is cut at a line boundary.
    Raises UserError for text that cannot be read, and where there is no text at all.
    """
    documents: list[Document] = []
    left = max_bytes
    for document in SOURCES[domain.builtin or "files"](domain, seed, max_bytes):
        data = document.text.encode()
        if len(data) > left:
            document = Document(document.name, cut_bytes(data, left).decode())
            left = 0
        else:
            left -= len(data)
        if document.text.strip():
            documents.append(document)
        if left <= 0:
            break
    if not documents:
        raise UserError(_no_text(domain, max_bytes))
    return documents


def cut_bytes(data: bytes, size: int) -> bytes:
    """At most `size` bytes of UTF-8 data, up to the end of a line where there is one, else up to the end of a character."""
    newline = data.rfind(b"\n", 0, size)
    if newline >= 0:
        return data[: newline + 1]
    while size > 0 and data[size] & 0xC0 == 0x80:
        size -= 1
    return data[:size]


def _no_text(domain: Domain, max_bytes: int) -> str:
    found = f"no text found for data domain {domain.name!r}: looked for "
    if domain.builtin is None:
        return (
            f"{found}{', '.join(FILE_SUFFIXES)} files with text in them in {domain.path!r}; "
            "point --data.path at a text file or at a directory with some"
        )
    places = "the standard library" + (f" and the packages {', '.join(PROSE_PACKAGES)}" if domain.builtin == "prose" else "")
    return (
        f"{found}Python source of {places} under {python_text.standard_library_root()!r} (limit {max_bytes} bytes); "
        "where Python is installed without sources, set --data.path to your own text"
    )


def split_documents(documents: list[Document], held_out_fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Whole documents into (train, held_out), chosen by a stable hash of their names until the share of the text is reached.

    Documents are taken in the order of their hashes; one that is larger than what is left of the share is passed over.
    Neither side is empty: where every document is larger than the share, the smallest is held out. A single document is
    cut at a line boundary instead (inside the line, if it has one line only), and its last part, at least a line, is held out.
    """
    if len(documents) == 1:
        return _split_lines(documents[0], held_out_fraction)
    sizes = [len(document.text) for document in documents]
    left = held_out_fraction * sum(sizes)
    order = sorted(range(len(documents)), key=lambda i: (stable_key(documents[i].name, seed + 1), i))
    held: set[int] = set()
    for index in order:
        if sizes[index] <= left and len(held) < len(documents) - 1:
            held.add(index)
            left -= sizes[index]
    if not held:
        held.add(min(order, key=lambda i: sizes[i]))
    train = [document for index, document in enumerate(documents) if index not in held]
    return train, [documents[index] for index in sorted(held)]


def _split_lines(document: Document, held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    if len(text) < 2:
        raise UserError(f"the only document, {document.name!r}, is too short to hold a part of it out; add text to the data path")
    wanted = min(max(int(len(text) * (1 - held_out_fraction)), 1), len(text) - 1)
    cut = text.rfind("\n", 0, wanted) + 1 or text.find("\n", wanted, len(text) - 1) + 1 or wanted
    return [Document(document.name, text[:cut])], [Document(f"{document.name} (end)", text[cut:])]
