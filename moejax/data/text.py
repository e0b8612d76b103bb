"""Tokenizers: text to ids and back, training one, finding the one that belongs to a directory.

A tokenizer trained here loses nothing: decode(encode(text)) is the text, whatever its characters, tabs and newlines
included. Published SentencePiece files behave as their models were trained: a space is put before the text, and
the sign "▁" reads as a space.
"""

from __future__ import annotations

import codecs
import collections
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moejax.config import UserError
from moejax.data.chat import encode_chat
from moejax.data.json_tokenizer import JsonTokenizer
from moejax.data.tokenizer_files import SETTINGS_FILE, TokenizerSettings, read_bytes, read_json, read_settings, save_files

_SPACE = "▁"  # how SentencePiece spells a space inside its pieces
_SMALLEST_VOCABULARY = 280  # 256 bytes, 3 control pieces, and a few characters
# A newline with an indentation as one piece; the last space is left to the word that follows, which has a piece with it.
_INDENTATIONS = tuple("\n" + _SPACE * (size - 1) for size in (4, 8, 12, 16, 20, 24))
# The SentencePiece file of Mistral 7B and Mixtral 8x7B: nothing inside it says which chat format its models use.
_MISTRAL_V1_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"


class Tokenizer(Protocol):
    """What training, sampling and serving need of a tokenizer."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_format: str | None  # one of moejax.data.chat.CHAT_FORMATS
    model_bytes: bytes  # the tokenizer's file

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of the text, with the BOS id in front where `add_bos` and the tokenizer has it so. No EOS."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """encode(text, add_bos=False) of each text, on all cores or `threads`."""
        ...

    def decode(self, ids: Sequence[int], is_start: bool = True) -> str:
        """Text of the ids without control ids; `is_start=False` where they go on from earlier ids, so no leading space is dropped."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation ready for the reply; UserError without a known chat format."""
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what `load_tokenizer(directory)` needs."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model, given as a path or as the bytes of the file. Raises UserError for what is none."""

    def __init__(self, model: str | os.PathLike[str] | bytes, settings: TokenizerSettings | None = None):
        import sentencepiece

        where = "the given bytes" if isinstance(model, bytes) else repr(os.fspath(model))
        self.model_bytes = model if isinstance(model, bytes) else read_bytes(Path(model))
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
            self.vocab_size: int = self._model.vocab_size()
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"{where} is not a SentencePiece model ({len(self.model_bytes)} bytes); expected a tokenizer.model file, whole "
                "(a file of some hundred bytes is often a pointer left by a download without Git LFS)"
            ) from error
        settings = settings or TokenizerSettings(chat_format=self._guess_chat_format())
        self.add_bos = settings.add_bos
        self.chat_format = settings.chat_format
        bos, eos = self._model.bos_id(), self._model.eos_id()
        self.bos_token_id: int | None = settings.bos_token_id if settings.bos_token_id is not None else (bos if bos >= 0 else None)
        self.eos_token_ids: tuple[int, ...] = settings.eos_token_ids if settings.eos_token_ids is not None else ((eos,) if eos >= 0 else ())
        self._has_prefix_space = self._model.encode("a", out_type=str)[0].startswith(_SPACE)
        self._bytes: list[bytes] | None = None
        ends = (self.bos_token_id, *self.eos_token_ids)
        control = [id for id in ends if id is not None and id < self.vocab_size and not self._model.is_control(id)]
        self._redefined = {id: self._model.id_to_piece(id).replace(_SPACE, " ") for id in control}

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of the text; control pieces spelled in it ("<s>") are text. Raises UserError for a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has no UTF-8 form at character {error.start} ({text[error.start]!r}); remove it, or decode the text as UTF-8"
            ) from error
        ids = self._encode_exact(text)
        return [self.bos_token_id, *ids] if add_bos and self.add_bos and self.bos_token_id is not None else ids

    def _encode_exact(self, text: str) -> list[int]:
        if _SPACE not in text or self._has_prefix_space:
            return self._spell_out(self._model.encode(text))
        # SentencePiece would read the sign as a space: its three bytes are put in by hand.
        sign = self._byte_pieces(_SPACE)
        first, *parts = map(self._model.encode, text.split(_SPACE))
        return first + [id for part in parts for id in (*sign, *part)]

    def _byte_pieces(self, text: str) -> list[int]:
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    def _spell_out(self, ids: list[int]) -> list[int]:
        """The ids with pieces whose id was made a control id (as Arctic's BOS and EOS are) spelled by their bytes: text opens no turn."""
        if not self._redefined or not any(id in self._redefined for id in ids):
            return ids
        return [part for id in ids for part in (self._byte_pieces(self._redefined[id]) if id in self._redefined else (id,))]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Ids of many texts without BOS, on all cores (or `threads`): the same as encode(text, add_bos=False) of each."""
        plain = [text for text in texts if _SPACE not in text]
        encoded = map(self._spell_out, self._model.encode(plain, num_threads=threads or os.cpu_count() or 1) if plain else [])
        return [self._encode_exact(text) if _SPACE in text else next(encoded) for text in texts]

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows other ids: no BOS, and no space put before it."""
        if not self._has_prefix_space:
            return self.encode(text, add_bos=False)
        mark = "<unk>"  # what the reference implementation uses, too
        return self._spell_out(self._model.encode(mark + text)[len(self._model.encode(mark)) :])

    def find_piece(self, piece: str) -> int | None:
        """The id of a piece, None where the vocabulary lacks it."""
        id = self._model.piece_to_id(piece)
        return id if self._model.id_to_piece(id) == piece else None

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes (maybe part of a character) that one id stands for; b"" for control ids, "\\ufffd" for ids of no piece."""
        if self._bytes is None:
            self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        return self._bytes[id] if 0 <= id < self.vocab_size else b"\xef\xbf\xbd"

    def _piece_bytes(self, id: int) -> bytes:
        model, piece = self._model, self._model.id_to_piece(id)
        if model.is_control(id) or model.is_unknown(id) or id == self.bos_token_id or id in self.eos_token_ids:
            return b""
        return bytes([int(piece[3:5], 16)]) if model.is_byte(id) else piece.replace(_SPACE, " ").encode()

    def drops_space(self, id: int) -> bool:
        """Whether the space this id begins with is the one put before a text, when the id is the first of it."""
        return self._has_prefix_space and 0 <= id < self.vocab_size and self._model.id_to_piece(id).startswith(_SPACE)

    def decode(self, ids: Sequence[int], is_start: bool = True) -> str:
        """Text of the ids without control ids; bytes that form no character become U+FFFD."""
        decoder = StreamDecoder(self, is_start)
        return "".join(map(decoder.push, map(int, ids))) + decoder.finish()

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation ready for the reply (`moejax.data.chat`). Raises UserError without a known chat format."""
        return encode_chat(self.chat_format, self, messages, add_generation_prompt)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.model and the settings beside it."""
        settings = TokenizerSettings(self.add_bos, self.bos_token_id, self.eos_token_ids, self.chat_format)
        save_files(Path(directory), "tokenizer.model", self.model_bytes, settings)

    def _guess_chat_format(self) -> str | None:
        """The chat format that the published file itself tells: by its control pieces, or by being the known file."""
        if self.find_piece("[INST]") is not None and self.find_piece("[SYSTEM_PROMPT]") is None:
            return "mistral-v3"
        return "mistral-v1" if hashlib.sha256(self.model_bytes).hexdigest() == _MISTRAL_V1_SHA256 else None


class StreamDecoder:
    """Ids to text one at a time; a character is handed out when its last byte is there.

    All that `push` and `finish` return, joined, is `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, is_start: bool = True):
        self._tokenizer = tokenizer
        self._at_start = is_start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # for tokenizers that cannot tell the bytes of one id
        self._shown = ""

    def push(self, id: int) -> str:
        """The text that is complete with this id; often "" in the midst of a character."""
        if not isinstance(self._tokenizer, SentencePieceTokenizer):
            self._ids.append(id)
            text = self._tokenizer.decode(self._ids)
            return "" if text.endswith("\ufffd") else self._show(text)
        data = self._tokenizer.token_bytes(id)
        if self._at_start and data:
            data = data[1:] if self._tokenizer.drops_space(id) else data
            self._at_start = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else ""."""
        if self._ids:
            return self._show(self._tokenizer.decode(self._ids))
        return self._decoder.decode(b"", final=True)

    def _show(self, text: str) -> str:
        new, self._shown = text[len(self._shown) :], text
        return new


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A lossless SentencePiece BPE tokenizer with byte fallback; unk, bos, eos are 0, 1, 2. The same texts give the same model.

    The caller bounds the text (some 10^6 characters are plenty). Where it has too few different words for `vocab_size` pieces,
    the vocabulary is smaller; ids stay below `vocab_size` always. Raises UserError for a size that bytes alone would fill, and for no text.
    """
    import io

    import sentencepiece

    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size={vocab_size} is too small for a tokenizer with byte pieces; use at least {_SMALLEST_VOCABULARY}")
    samples = [text.replace(_SPACE, " ").replace("\0", " ") for text in texts]
    counts = collections.Counter[str]()
    for text in samples:
        counts.update(text)
    if not counts:
        raise UserError("there is no text to train a tokenizer on; point the data configuration at text")
    # Rare characters are left to the bytes; so are common ones where they would fill a small vocabulary.
    total, room = sum(counts.values()), (vocab_size - 259) // 2
    kept = {char for char, count in counts.most_common(room) if count >= 3e-6 * total}
    dropped = {ord(char): None for char in counts if char not in kept and char != " "}
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text.translate(dropped) if dropped else text for text in samples),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=_SPACE,  # without this piece a space would be read as the bytes of the sign
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=list(_INDENTATIONS) if vocab_size >= 1024 else [],
        max_sentence_length=1 << 30,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceTokenizer(buffer.getvalue(), TokenizerSettings())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a directory (a run, one of its steps, a published model) or of one file.

    Raises UserError where there is none, saying what was looked for, and for a file that is broken.
    """
    tokenizer = find_tokenizer(path)
    if tokenizer is None:
        raise UserError(
            f"no tokenizer found in {os.fspath(path)!r}; expected tokenizer.model (SentencePiece) or tokenizer.json there; "
            "copy the model's tokenizer file beside its weights"
        )
    return tokenizer


def find_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Like `load_tokenizer`, but None where there is none. Raises UserError where the path does not exist or a file is broken."""
    place = Path(path).expanduser()
    if place.is_file():
        return _load_file(place)
    if not place.is_dir():
        raise UserError(f"{str(place)!r} does not exist; expected a directory with a tokenizer, or a tokenizer file")
    folders = [place]
    # The tokenizer lies with the run, above its checkpoints/<step> directories.
    resolved = place.resolve()
    while resolved.name.isdigit() or resolved.name == "checkpoints":
        resolved = resolved.parent
        folders.append(resolved)
    for folder in folders:
        for pattern in ("tokenizer.model", "tokenizer.model.v*", "*tokenizer*.model.v*", "tokenizer.json"):
            found = sorted(file for file in folder.glob(pattern) if file.is_file())
            if found:
                return _load_file(found[0])
    return None


def _load_file(path: Path) -> Tokenizer:
    own = path.parent / SETTINGS_FILE
    published = path.parent / "tokenizer_config.json"
    is_json = path.suffix == ".json"
    if own.is_file():
        settings = read_settings(own)
        return JsonTokenizer(path, settings) if is_json else SentencePieceTokenizer(path, settings)
    values = read_json(published) if published.is_file() else {}
    if is_json:
        bos, eos = (_content(values.get(name)) for name in ("bos_token", "eos_token"))
        tokenizer = JsonTokenizer(path, TokenizerSettings(add_bos=bool(values.get("add_bos_token", True))), bos, eos)
        return JsonTokenizer(path, _published_settings(values, tokenizer, None))
    tokenizer = SentencePieceTokenizer(path)
    return SentencePieceTokenizer(path, _published_settings(values, tokenizer, tokenizer.chat_format)) if values else tokenizer


def _published_settings(
    values: dict[str, Any], tokenizer: SentencePieceTokenizer | JsonTokenizer, chat_format: str | None
) -> TokenizerSettings:
    """Settings from a tokenizer_config.json, whose added tokens may redefine ids of the vocabulary (Arctic's BOS and EOS do)."""
    added = {_content(token): int(id) for id, token in values.get("added_tokens_decoder", {}).items()}

    def find(name: str) -> int | None:
        piece = _content(values.get(name))
        return None if piece is None else added.get(piece, tokenizer.find_piece(piece))

    bos, eos = find("bos_token"), find("eos_token")
    template = str(values.get("chat_template") or "")
    if values.get("tokenizer_class") == "ArcticTokenizer" or ("<|im_start|>" in template and added.get("<|im_start|>") == bos is not None):
        chat_format = "arctic" if eos is not None else chat_format
    elif "[INST]" in template and chat_format is None:
        chat_format = "mistral-v1" if tokenizer.find_piece("[INST]") is None else "mistral-v3"
    return TokenizerSettings(
        add_bos=bool(values.get("add_bos_token", True)),
        bos_token_id=tokenizer.bos_token_id if bos is None else bos,
        eos_token_ids=tokenizer.eos_token_ids if eos is None else (eos,),
        chat_format=chat_format,
    )


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
