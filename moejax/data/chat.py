"""Conversations as token ids, in the exact formats of the published instruction-tuned models.

Formats: `mistral-v1` (Mixtral 8x7B Instruct), `mistral-v3` (Mixtral 8x22B Instruct), `arctic` (Snowflake Arctic Instruct).
The Mistral ones follow mistral-common, which encodes every piece of text apart from the marks around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moejax.config import UserError

CHAT_FORMATS = ("mistral-v1", "mistral-v3", "arctic")
_ROLES = ("system", "user", "assistant")


class _Encoder(Protocol):
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str, add_bos: bool = True) -> list[int]: ...
    def encode_continuation(self, text: str) -> list[int]: ...
    def find_piece(self, piece: str) -> int | None: ...


def encode_chat(
    chat_format: str | None, tokenizer: _Encoder, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation, BOS included, ready for the model's reply.

    messages: {"role": "system" | "user" | "assistant", "content": str}, in order; the Mistral formats want the last one to be the
    user's, or an assistant's with "prefix": True, which the reply continues. `add_generation_prompt` matters to `arctic` only.
    Raises UserError where the tokenizer has no known format and where the messages cannot be put into it.
    """
    if chat_format is None:
        raise UserError(
            "this tokenizer has no chat format, as tokenizers of base models and of own training runs have none; encode plain text with "
            f"encode(), or load a tokenizer of an instruction-tuned model (known formats: {', '.join(CHAT_FORMATS)})"
        )
    if chat_format not in CHAT_FORMATS:
        raise UserError(f"chat format {chat_format!r} is unknown; expected one of {', '.join(CHAT_FORMATS)}")
    _check(messages)
    if chat_format == "arctic":
        return _encode_arctic(tokenizer, messages, add_generation_prompt)
    return _encode_mistral(chat_format, tokenizer, messages)


def check_chat_format(chat_format: str, tokenizer: _Encoder) -> None:
    """Raises UserError where the format is unknown, or the tokenizer lacks what its marks are made of."""
    if chat_format not in CHAT_FORMATS:
        raise UserError(f"chat format {chat_format!r} is unknown; expected one of {', '.join(CHAT_FORMATS)}")
    lacking = [mark for mark in ("[INST]", "[/INST]") if chat_format == "mistral-v3" and tokenizer.find_piece(mark) is None]
    if tokenizer.bos_token_id is None or not tokenizer.eos_token_ids:
        lacking += ["ids of beginning and end of text"]
    if lacking:
        raise UserError(f"chat format {chat_format!r} does not go with this tokenizer: it has no {' and no '.join(lacking)}")


def render_arctic(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """A conversation as Arctic's template writes it, control marks spelled out."""
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise UserError("the conversation is empty; give at least one message, like {'role': 'user', 'content': 'Hi'}")
    for number, message in enumerate(messages):
        if message.get("role") not in _ROLES:
            raise UserError(f"message {number} has role {message.get('role')!r}; expected one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {number} has content of type {type(message.get('content')).__name__}; expected a string")


def _encode_arctic(tokenizer: _Encoder, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[int]:
    # Text is encoded piece by piece, so that a mark typed by a user stays text and opens no turn of its own.
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_ids[0]
    assert start is not None  # loading gives this format only to tokenizers with both marks
    ids: list[int] = []
    for message in messages:
        ids += [
            start,
            *tokenizer.encode_continuation(f"{message['role']}\n{message['content']}"),
            end,
            *tokenizer.encode_continuation("\n"),
        ]
    if add_generation_prompt:
        ids += [start, *tokenizer.encode_continuation("assistant\n")]
    return ids


def _merge(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, str]], bool]:
    """The system text, the turns with neighbours of one role joined, and whether the last turn is to be continued."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"])
    turns: list[tuple[str, str]] = []
    for message in messages:
        if message["role"] == "system":
            continue
        if turns and turns[-1][0] == message["role"]:
            turns[-1] = (message["role"], turns[-1][1] + "\n\n" + message["content"])
        else:
            turns.append((message["role"], message["content"]))
    if not turns or turns[0][0] != "user":
        raise UserError("the conversation does not start with a user message (after an optional system message); put one first")
    continued = turns[-1][0] == "assistant"
    if continued and not messages[-1].get("prefix"):
        raise UserError(
            "the conversation ends with an assistant message; end it with a user message, or set 'prefix': True to have it continued"
        )
    return system, turns, continued


def _encode_mistral(chat_format: str, tokenizer: _Encoder, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    system, turns, continued = _merge(messages)
    assert tokenizer.bos_token_id is not None  # SentencePiece files of this format all have one
    first_version = chat_format == "mistral-v1"
    users = [index for index, (role, _) in enumerate(turns) if role == "user"]
    system_turn = users[0] if first_version else users[-1]
    begin, end = tokenizer.find_piece("[INST]"), tokenizer.find_piece("[/INST]")
    ids = [tokenizer.bos_token_id]
    for index, (role, content) in enumerate(turns):
        if role == "user":
            if system and index == system_turn:
                content = f"{system}\n\n{content}"
            if first_version:
                ids += tokenizer.encode(f"[INST] {content} [/INST]", add_bos=False)
            else:
                assert begin is not None and end is not None  # this format is recognised by these pieces
                ids += [begin, *tokenizer.encode(content, add_bos=False), end]
        else:
            ids += tokenizer.encode(content if first_version else content.rstrip(" "), add_bos=False)
            if not (continued and index == len(turns) - 1):
                ids.append(tokenizer.eos_token_ids[0])
    return ids
