"""The tokens and the held-out text of a run, kept with the run: the next start is quick and goes on with the same data."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import DataConfig
from moejax.data.sources import Document, describe_files

CACHE_FILE = "data.npz"
_VERSION = 1  # of the layout below and of what reading the same configuration yields

Streams = Mapping[str, tuple[np.ndarray, np.ndarray]]  # domain -> (ids of all documents, size of each document)


def _key(data: DataConfig, tokenizer_bytes: bytes) -> str:
    """A hash of all that decides the tokens, but for the sources of installed packages: a run keeps what it began with."""
    files = {domain.name: describe_files(domain) for domain in data.sources}
    described = {**asdict(data), "sequence_length": None, "tokenizer": hashlib.sha256(tokenizer_bytes).hexdigest(), "files": files}
    return hashlib.sha256(json.dumps([_VERSION, described], sort_keys=True).encode()).hexdigest()


def save(
    directory: str | os.PathLike[str],
    data: DataConfig,
    tokenizer_bytes: bytes,
    streams: Streams,
    held_out: Mapping[str, Sequence[Document]],
    log: Callable[[str], None],
) -> None:
    """Writes data.npz into the directory, whole or not at all. A full disk is logged: the run can do without this file."""
    arrays: dict[str, Any] = {}
    for number, (ids, sizes) in enumerate(streams.values()):
        small = not len(ids) or int(ids.max()) < 2**16
        arrays |= {f"ids_{number}": ids.astype(np.uint16) if small else ids, f"sizes_{number}": sizes}
    texts = {name: [[document.name, document.text] for document in documents] for name, documents in held_out.items()}
    header = json.dumps({"key": _key(data, tokenizer_bytes), "domains": list(streams), "held_out": texts}).encode()
    path = Path(directory, CACHE_FILE)
    temporary = path.with_name(f".{CACHE_FILE}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)
        os.replace(temporary, path)
    except OSError as error:
        log(f"could not keep the tokens in {str(path)!r} ({error.strerror}); the next start reads the text again")
    finally:
        temporary.unlink(missing_ok=True)


def load(
    directory: str | os.PathLike[str], data: DataConfig, tokenizer_bytes: bytes, log: Callable[[str], None]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, list[Document]]] | None:
    """(streams, held-out documents) as saved for this configuration and tokenizer.

    None, with the reason logged, where the file is broken or was made from something else.
    """
    path = Path(directory, CACHE_FILE)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            header = json.loads(arrays["header"].tobytes())
            if header["key"] != _key(data, tokenizer_bytes):
                log(f"{str(path)!r} was made from other text or another data configuration; reading the text again")
                return None
            streams = {
                name: (arrays[f"ids_{number}"].astype(np.int32), arrays[f"sizes_{number}"]) for number, name in enumerate(header["domains"])
            }
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log(f"{str(path)!r} cannot be read ({error}); reading the text again")
        return None
    held_out = {name: [Document(*document) for document in documents] for name, documents in header["held_out"].items()}
    tokens = ", ".join(f"{name} {len(ids) / 1e6:.2f} M" for name, (ids, _) in streams.items())
    log(f"data: tokens kept in {str(path)!r} ({tokens})")
    return streams, held_out
