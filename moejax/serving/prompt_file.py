"""Prompts of a JSONL file continued into another one: a line for a line, in order, and where it was after a stop.

A line of the input holds `prompt` (text), `messages` (a conversation) or `tokens` (ids), and any field of GenerationSettings. A line of
the output holds `line`, `text`, `tokens`, `finish_reason`, where asked for `logprobs` and `prompt_logprobs`, and `request`, a checksum
of what was asked, by which a continued file is known to answer the same lines.
"""

from __future__ import annotations

import json
import os
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.checks import UserError, nearest
from moejax.generation_config import GenerationSettings

if TYPE_CHECKING:  # lines are read, and refused, before jax is imported
    from moejax.serving.engine import Engine
    from moejax.serving.generation import Generation, TokenScore

INPUTS = ("prompt", "messages", "tokens")


@dataclass(frozen=True)
class Request:
    """One line of the input."""

    where: str  # "FILE, line N"
    line: int  # from 1
    kind: str  # one of INPUTS
    value: Any
    settings: GenerationSettings
    checksum: str

    def encode(self, tokenizer: Any, vocab_size: int) -> list[int]:
        """The prompt's ids. Raises UserError, naming the line, for what the tokenizer or the vocabulary refuses."""
        try:
            ids = self.value if self.kind == "tokens" else getattr(tokenizer, "encode" if self.kind == "prompt" else "chat")(self.value)
        except UserError as error:
            raise UserError(f"{self.where}: {self.kind}: {error}") from None
        named = (("tokens", ids), ("logit_bias", self.settings.logit_bias), ("stop_token_ids", self.settings.stop_token_ids))
        for name, several in named:
            if outside := [id for id in several if not 0 <= id < vocab_size]:
                raise UserError(f"{self.where}: {name} holds token {outside[0]}, outside the model's vocabulary of {vocab_size}")
        if not ids:
            raise UserError(f"{self.where}: {self.kind} has no tokens; give at least one")
        return list(ids)


def read_requests(path: Path, defaults: GenerationSettings, model: str) -> list[Request]:
    """The lines of a file. A line without a seed of its own gets that of the defaults plus its place, from 0.

    `model` names what answers, and enters the checksums. Raises UserError that names file, line and field for the first bad line.
    """
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")  # splitlines would cut at U+2028, which JSON holds as it is
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}; expected a JSONL file in UTF-8") from None
    if lines == [""]:
        raise UserError(f"--prompts {path} is empty; expected a JSON object a line, with one of {', '.join(INPUTS)}")
    return [_read_line(f"{path}, line {number}", number, text, defaults, model) for number, text in enumerate(lines, 1)]


def _read_line(where: str, number: int, text: str, defaults: GenerationSettings, model: str) -> Request:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} is {type(values).__name__}; expected an object with one of {', '.join(INPUTS)}")
    known = (*INPUTS, *(item.name for item in fields(GenerationSettings)))
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{where}: there is no field {unknown[0]!r}{nearest(unknown[0], known)}; known are {', '.join(known)}")
    given = [name for name in INPUTS if name in values]
    if len(given) != 1:
        raise UserError(f"{where} has {' and '.join(given) or 'no prompt'}; expected exactly one of {', '.join(INPUTS)}")
    kind, value = given[0], values.pop(given[0])
    _check_input(where, kind, value)
    try:
        settings = replace(defaults, **{"seed": defaults.seed + number - 1, **values})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    checksum = zlib.crc32(json.dumps([model, kind, value, asdict(settings)], sort_keys=True).encode())
    return Request(where, number, kind, value, settings, f"{checksum:08x}")


def _check_input(where: str, kind: str, value: Any) -> None:
    expected = {
        "prompt": (lambda: isinstance(value, str), "a text"),
        "tokens": (lambda: isinstance(value, list) and all(type(id) is int for id in value), "a list of token ids"),
        "messages": (
            lambda: isinstance(value, list) and value and all(isinstance(item, dict) for item in value),
            'a list of messages, as [{"role": "user", "content": "hello"}]',
        ),
    }
    fits, what = expected[kind]
    if not fits():
        raise UserError(f"{where}: {kind}={json.dumps(value)[:80]}; expected {what}")


def count_answered(out: Path, requests: Sequence[Request]) -> int:
    """How many requests the file answers already; a last line that a stop has cut is not counted. Changes nothing.

    Raises UserError where it is a file of something else.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out} cannot be written; name a file in a directory that exists")
    lines = _complete_lines(out)
    for number, line in enumerate(lines, 1):
        try:
            same = number <= len(requests) and json.loads(line)["request"] == requests[number - 1].checksum
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"{out}, line {number} does not answer that line of --prompts with these settings; name another --out")
    return len(lines)


def complete_file(
    engine: Engine, tokenizer: Any, requests: Sequence[Request], out: Path, batch_size: int, say: Callable[[str], None]
) -> None:
    """Writes what is missing of `out`, a batch at a time, each whole before the next begins; `say` hears of progress."""
    encoded = [request.encode(tokenizer, engine.model.config.vocab_size) for request in requests]
    done = count_answered(out, requests)
    if done:
        say(f"{out}: {done} of {len(requests)} are answered already")
    started, made = time.perf_counter(), 0
    with out.open("ab") as file:
        file.truncate(sum(map(len, _complete_lines(out))))  # a line that a stop has cut
        for first in range(done, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            generations = _complete(engine, encoded[first : first + batch_size], batch, say)
            made += sum(len(generation.tokens) for generation in generations)
            file.write("".join(map(_write_line, batch, generations)).encode())
            file.flush()
            os.fsync(file.fileno())
            rate = made / (time.perf_counter() - started)
            say(f"{first + len(batch)}/{len(requests)} prompts, {made} tokens, {rate:.1f} tokens/s")


def _complete(engine: Engine, prompts: list[list[int]], batch: Sequence[Request], say: Callable[[str], None]) -> list[Generation]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generations = engine.complete(prompts, [request.settings for request in batch])
    for warning in caught:
        say(f"from {batch[0].where} on, {warning.message}")
    return generations


def _write_line(request: Request, made: Generation) -> str:
    values: dict[str, Any] = {"line": request.line, "text": made.text, "tokens": made.tokens, "finish_reason": made.finish_reason}
    for name in ("logprobs", "prompt_logprobs"):
        scores: Sequence[TokenScore | None] | None = getattr(made, name)
        if scores is not None:
            values[name] = [score and {"token": score.token, "logprob": score.logprob, "top": score.top} for score in scores]
    return json.dumps({**values, "request": request.checksum}, ensure_ascii=False) + "\n"


def _complete_lines(out: Path) -> list[bytes]:
    if not out.exists():
        return []
    return [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
