"""Says to transformers what a SentencePiece tokenizer of ours does, in a tokenizer_config.json, where none came with the model.

Without it transformers leaves out the beginning of the text, and takes pieces that were defined by hand (line breaks with their
indentation, in tokenizers we train) for ordinary ones, which gives other ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax.config import UserError

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
SETTINGS = "tokenizer_settings.json"
_NORMAL, _USER_DEFINED = 1, 4  # SentencePiece.Type


def write_tokenizer_config(directory: Path) -> None:
    """Writes `directory`/tokenizer_config.json for the tokenizer.model there; does nothing where one of them is missing or there already.

    Raises UserError, naming the file, for a tokenizer.model that is damaged.
    """
    model = directory / MODEL
    if not model.exists() or any((directory / name).exists() for name in (CONFIG, "tokenizer.json")):
        return
    settings = json.loads((directory / SETTINGS).read_bytes()) if (directory / SETTINGS).exists() else {}
    try:
        values = describe_tokenizer(model.read_bytes(), settings)
    except (IndexError, ValueError) as error:
        raise UserError(f"{model} is no whole SentencePiece model ({error}); restore the file") from error
    (directory / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_tokenizer(model: bytes, settings: dict[str, Any]) -> dict[str, Any]:
    """The values of a tokenizer_config.json for a SentencePiece model with the settings of tokenizer_settings.json."""
    pieces = list(_read_pieces(model))
    bos = settings.get("bos_token_id")
    eos = settings.get("eos_token_ids") or [2]
    added = {
        str(number): {
            "content": piece,
            "lstrip": False,
            "normalized": True,  # compared after spaces have become the sign that pieces spell them with
            "rstrip": False,
            "single_word": False,
            "special": False,
        }
        for number, (piece, kind) in enumerate(pieces)
        if kind == _USER_DEFINED
    }
    return {
        "added_tokens_decoder": added,
        "add_bos_token": settings.get("add_bos", True),
        "add_eos_token": False,
        "bos_token": pieces[1 if bos is None else bos][0],
        "eos_token": pieces[eos[0]][0],
        "unk_token": pieces[0][0],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "LlamaTokenizer",
    }


def _read_pieces(model: bytes) -> Iterator[tuple[str, int]]:
    """The pieces of a model, as (text, type), in the order of their ids: field 1 of ModelProto, whose fields 1 and 3 they are."""
    for field, value in _read_fields(model):
        if field == 1 and isinstance(value, bytes):
            piece = dict(_read_fields(value))
            text, kind = piece.get(1, b""), piece.get(3, _NORMAL)
            if not isinstance(text, bytes) or not isinstance(kind, int):
                raise ValueError("a piece has fields of another type")
            yield text.decode(), kind


def _read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: (number, integer or bytes). The protobuf package, which reads the same, is no dependency."""
    position = 0

    def read_varint() -> int:
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        tag = read_varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, read_varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field of type {kind}")
        length = read_varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if position + length > len(message):
            raise ValueError("it ends within a field")
        yield tag >> 3, message[position : position + length]
        position += length
