"""A tokenizer's files on disk: what is kept beside the vocabulary, and reading and writing both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moejax.config import UserError
from moejax.data.chat import CHAT_FORMATS
from moejax.files import write_file

SETTINGS_FILE = "tokenizer_settings.json"


@dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer's own file does not say; None keeps what it says."""

    add_bos: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] | None = None
    chat_format: str | None = None


def read_settings(path: Path) -> TokenizerSettings:
    """The settings that `save_files` wrote. Raises UserError for a file that is broken or from a newer version."""
    values = read_json(path)
    try:
        settings = TokenizerSettings(**values)
    except TypeError as error:
        raise UserError(
            f"{str(path)!r} has fields this version does not know ({error}); it may come from a newer version of moejax"
        ) from error
    if settings.chat_format is not None and settings.chat_format not in CHAT_FORMATS:
        raise UserError(f"{str(path)!r} names the unknown chat_format {settings.chat_format!r}; expected one of {', '.join(CHAT_FORMATS)}")
    return settings if settings.eos_token_ids is None else replace(settings, eos_token_ids=tuple(settings.eos_token_ids))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError, naming the file."""
    try:
        values = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON ({error}); restore the file") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a {type(values).__name__}; expected a JSON object")
    return values


def read_bytes(path: Path) -> bytes:
    """The bytes of a tokenizer file. Raises UserError, naming the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer file {str(path)!r}: {error.strerror}; check the path and its permissions") from error


def save_files(directory: Path, name: str, data: bytes, settings: TokenizerSettings) -> None:
    """Writes a tokenizer's file and its settings into the directory, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    # The settings first: a model file alone would be read with other ones.
    for file, content in ((SETTINGS_FILE, json.dumps(asdict(settings), indent=2).encode() + b"\n"), (name, data)):
        write_file(directory / file, content)
