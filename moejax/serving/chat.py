"""A conversation with a model: what was said so far, replies as they come, and the loop that reads a person's lines.

Replies go to stdout and nothing else does; prompts, notes and answers to commands go to stderr.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, TextIO

from moejax.cache_config import CacheConfig
from moejax.config import UserError
from moejax.data.text import Tokenizer
from moejax.generation_config import GenerationSettings
from moejax.serving.engine import Engine

HELP = """/reset  forget the conversation and start a new one
/undo   take back the last message and its reply
/help   show these lines
/exit   leave (Ctrl-D does too); Ctrl-C cuts a reply short"""
# Shapes are padded to this many tokens, so that a conversation is compiled for again only when it has grown by as many.
BUCKET = 256


class Conversation:
    """Messages and replies in turn, each reply read from the whole of what was said."""

    def __init__(
        self,
        model: Any,
        variables: Any,
        tokenizer: Tokenizer,
        settings: GenerationSettings,
        cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen
    ):
        self.engine = Engine(model, variables, bucket=BUCKET, tokenizer=tokenizer, cache=cache)
        self.tokenizer = tokenizer
        self.settings = replace(settings, ignore_eos=False)
        self.messages: list[dict[str, str]] = []

    def reply(self, text: str) -> Generator[str, None, None]:
        """Pieces of the reply to `text`. Both are kept when it ends, also where the caller closes the iterator before.

        A reply ends at an EOS of the model or of the tokenizer, before a stop string, with the settings' number of tokens, or where the
        positions that the model is meant for end. Raises UserError, and keeps nothing, where the conversation has filled those.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.chat(messages)
        room = self.engine.model.config.max_length - len(ids) if self.engine.cache.kind == "full" else math.inf
        if room < 1:
            raise UserError(
                f"the conversation would have {len(ids)} tokens, and this model is meant for {self.engine.model.config.max_length}; "
                "/undo takes the last exchange back, /reset starts anew"
            )
        settings = replace(
            self.settings,
            max_new_tokens=min(self.settings.max_new_tokens, room),
            stop_token_ids=(*self.settings.stop_token_ids, *self.tokenizer.eos_token_ids),
        )
        # Arctic's marks are followed by text as it is; Mistral's models put a space before a reply, which is none of its text.
        is_start = self.tokenizer.chat_format != "arctic"
        said: list[str] = []
        refused = False
        try:
            for (made,) in self.engine.follow([ids], settings, is_start):
                said.append(made.text[sum(map(len, said)) :])
                yield said[-1]
        except UserError:
            refused = True
            raise
        finally:  # also after Ctrl-C, and where the caller has heard enough
            self.messages = self.messages if refused else [*messages, {"role": "assistant", "content": "".join(said)}]

    def undo(self) -> bool:
        """Takes back the last message and its reply; False where there is none."""
        had_any = bool(self.messages)
        self.messages = self.messages[:-2]
        return had_any

    def reset(self) -> None:
        """Forgets everything."""
        self.messages = []


def converse(conversation: Conversation, first: str | None = None, lines: TextIO | None = None) -> None:
    """Answers `first`, then every line of `lines` (stdin), until they end or one says /exit."""
    read = _person_reader() if lines is None else _line_reader(lines)
    text = read() if first is None else first
    while text is not None:
        text = text.strip()
        if text == "/exit":
            return
        if text.startswith("/"):
            note(answer_command(conversation, text))
        elif text:
            _print_reply(conversation, text)
        text = read()


def answer_command(conversation: Conversation, text: str) -> str:
    """Does what a line that begins with "/" says, and tells what was done."""
    if text == "/reset":
        conversation.reset()
        return "a new conversation"
    if text == "/undo":
        done = conversation.undo()
        return f"taken back; {len(conversation.messages) // 2} exchanges are left" if done else "there is nothing to take back"
    return HELP if text == "/help" else f"there is no command {text!r}\n{HELP}"


def _print_reply(conversation: Conversation, text: str) -> None:
    pieces = conversation.reply(text)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except UserError as error:
        note(f"error: {error}")
        return
    except KeyboardInterrupt:
        pieces.close()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _person_reader() -> Callable[[], str | None]:
    """Reads stdin: with a prompt and line editing at a terminal, as it is elsewhere. None is the end."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        return _line_reader(sys.stdin)

    def ask() -> str | None:
        try:
            return input("> ")
        except EOFError:
            note("")
            return None

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history and arrow keys, where Python was built with it
    note("/help shows the commands")
    return ask


def _line_reader(lines: TextIO) -> Callable[[], str | None]:
    return lambda: lines.readline() or None


def note(line: str) -> None:
    """A line to stderr."""
    print(line, file=sys.stderr, flush=True)
