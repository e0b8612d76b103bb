"""The tokenizer of a published model that comes as a tokenizer.json only, read by the optional `tokenizers` package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.config import UserError
from moejax.data.chat import encode_chat
from moejax.data.tokenizer_files import TokenizerSettings, read_bytes, save_files


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` package, for directories that carry no SentencePiece file."""

    def __init__(
        self, path: str | os.PathLike[str], settings: TokenizerSettings | None = None, bos: str | None = None, eos: str | None = None
    ):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{os.fspath(path)!r} needs the package 'tokenizers'; install it with: pip install tokenizers") from error
        self.model_bytes = read_bytes(Path(path))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.model_bytes.decode())
        except Exception as error:  # the package raises a bare Exception
            raise UserError(
                f"{os.fspath(path)!r} is not a tokenizer.json ({error}); expected one written by the 'tokenizers' package"
            ) from error
        settings = settings or TokenizerSettings()
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.add_bos, self.chat_format = settings.add_bos, settings.chat_format
        self.bos_token_id: int | None = settings.bos_token_id if settings.bos_token_id is not None else self.find_piece(bos or "<s>")
        end = self.find_piece(eos or "</s>")
        self.eos_token_ids: tuple[int, ...] = (
            settings.eos_token_ids if settings.eos_token_ids is not None else (() if end is None else (end,))
        )

    def find_piece(self, piece: str) -> int | None:
        """The id of a piece, None where the vocabulary lacks it."""
        return self._tokenizer.token_to_id(piece)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of the text, BOS first. Control pieces spelled in the text are read as such by this format."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_token_id, *ids] if add_bos and self.add_bos and self.bos_token_id is not None else ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Ids of many texts without BOS."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows other ids, without BOS."""
        return self.encode(text, add_bos=False)

    def decode(self, ids: Sequence[int], is_start: bool = True) -> str:
        """Text of the ids without control ids. What this format does at a start it does always: `is_start` changes nothing."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation ready for the reply. Raises UserError without a known chat format."""
        return encode_chat(self.chat_format, self, messages, add_generation_prompt)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and the settings beside it."""
        settings = TokenizerSettings(self.add_bos, self.bos_token_id, self.eos_token_ids, self.chat_format)
        save_files(Path(directory), "tokenizer.json", self.model_bytes, settings)
