"""A stream without end: loss, time and memory while a model reads on and on, with a window, with sinks before it, with all it has read.

    python -m moejax.evals streaming --checkpoint runs/tiny --tokens 200000 --sinks 4 --json streaming.json --figure streaming.svg

The stream is text that the run held out, in pieces spread so that any long stretch is of the same kind, with one BOS in front and nothing
in between: the model is given every token, and asked for the next. Four ways to read it:

    sinks    the first `sinks` tokens and the last `window` are kept
    window   as many tokens, all of them the last ones
    full     everything is kept; ends after `full_tokens`, since each step costs more than the one before
    rows     as in training, for comparison: rows of the length trained with, each with a BOS in front and nothing before it
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.config import UserError
from moejax.evals.output import Output, load_model, report
from moejax.evals.scoring import score_chunk, score_rows
from moejax.evals.stream_text import spread_evenly
from moejax.evals.streaming_figure import draw_streaming
from moejax.evals.texts import find_run, read_held_out, read_text, trained_length
from moejax.model.cache import Cache, create_cache
from moejax.model.transformer import Transformer
from moejax.training.hardware import read_status

BYTES_A_TOKEN = 16  # more than text has: what is read of --text is enough
ROWS = 8  # of one call of way `rows`
WAYS = ("sinks", "window", "full", "rows")
COLUMNS = (
    "tokens", "early_loss", "late_loss", "late_over_early", "cache_bytes", "early_seconds", "late_seconds", "early_resident_bytes",
    "late_resident_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments(Output):
    """Reads one stream in several ways, and says what each token cost and how well it was foreseen."""

    tokens: int = 200_000  # of the stream
    sinks: int = 4
    window: int | None = None  # tokens kept beside the sinks; None: the length trained with, less the sinks
    full_tokens: int = 20_000  # where way `full` ends
    early: tuple[int, int] = (10_000, 60_000)  # tokens whose mean loss is compared with that of the last ones, as many
    text: str | None = None  # a file, a directory or builtin:NAME to be read; None: what the run held out
    period: int | None = None  # the text begins again after so many tokens; None: never
    piece: int = 125  # tokens that stand together as they did in their document
    block: int = 1000  # tokens a figure is given for
    chunk: int = 125  # tokens of one call; any number gives the same
    ways: tuple[str, ...] = WAYS

    def __post_init__(self) -> None:
        for name in ("tokens", "full_tokens", "piece", "block", "chunk", "window", "period"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be above 0")
        if self.sinks < 0:
            raise UserError(f"sinks={self.sinks} must be 0 or more")
        for name in ("tokens", "full_tokens"):
            if getattr(self, name) % self.block:
                raise UserError(f"{name}={getattr(self, name)} is no multiple of block={self.block}; change one of them")
        if self.block % self.chunk:
            raise UserError(f"chunk={self.chunk} does not divide block={self.block}; change one of them")
        begin, end = self.early
        if not 0 <= begin < end <= self.tokens or begin % self.block or end % self.block:
            raise UserError(
                f"early={self.early} must be two multiples of block={self.block}, the first below the second, within tokens={self.tokens}"
            )
        for name in self.ways:
            if name not in WAYS:
                raise UserError(f"ways has {name!r}; expected some of {', '.join(WAYS)}")


@dataclass(frozen=True)
class Block:
    """What reading the tokens of one block gave and took."""

    loss: float  # mean over its tokens, in nats
    seconds: float | None
    resident_bytes: int | None  # memory of the process that no file holds, behind the block


def run(arguments: Arguments) -> None:
    """Reads, reports and draws."""
    started = time.perf_counter()
    config = find_run(str(arguments.checkpoint))
    model, variables, tokenizer = load_model(arguments)
    if tokenizer.bos_token_id is None:
        raise UserError(f"checkpoint={arguments.checkpoint!r} has a tokenizer without a BOS token to begin the stream with; use another")
    trained = trained_length(model.config, config)
    if arguments.window is None:
        arguments = replace(arguments, window=max(trained - arguments.sinks, 1))
    stream = make_stream(arguments, config, tokenizer)
    rows = []
    for way in arguments.ways:
        blocks = list(read_stream(model, variables, stream, way, arguments, trained))
        size = None if way == "rows" else sum(leaf.nbytes for leaf in jax.tree.leaves(make_cache(model, variables, way, arguments)))
        rows.append(describe_way(way, blocks, size, arguments))
    sizes = {name: getattr(arguments, name) for name in ("tokens", "sinks", "window", "period", "piece", "block", "chunk")}
    sizes |= {"trained_length": trained, "early_tokens": list(arguments.early)}
    result = report("streaming", {**sizes, "seconds": time.perf_counter() - started, "rows": rows}, arguments, COLUMNS)
    if arguments.figure is not None:
        draw_streaming(result, Path(arguments.figure))


def make_stream(arguments: Arguments, config: Any, tokenizer: Any) -> np.ndarray:
    """Token ids [1 + tokens]: BOS, then the text, again and again where it has a period."""
    length = min(arguments.period or arguments.tokens, arguments.tokens)
    if arguments.text is None:
        domains = read_held_out(str(arguments.checkpoint), config, tokenizer)
    else:
        domains = {"text": read_text(arguments.text, BYTES_A_TOKEN * length)}
    text = spread_evenly(domains, tokenizer, length, arguments.piece)
    return np.concatenate([np.array([tokenizer.bos_token_id], np.int32), np.resize(text, arguments.tokens)])


def read_stream(model: Transformer, variables: Any, stream: np.ndarray, way: str, arguments: Arguments, trained: int) -> Iterator[Block]:
    """The stream [1 + tokens] read block by block; the last block of way `full` is the one that ends at `full_tokens`."""
    if way == "rows":
        losses = score_fresh_rows(model, variables, stream, trained)
        yield from (Block(float(np.mean(part)), None, None) for part in losses.reshape(-1, arguments.block))
        return
    tokens = arguments.tokens if way != "full" else min(arguments.full_tokens, arguments.tokens)
    cache, counts = make_cache(model, variables, way, arguments), np.full(1, arguments.chunk, np.int32)
    score_chunk(model, variables, *_cut(stream, 0, arguments.chunk), make_cache(model, variables, way, arguments), counts)  # compiles
    for start in range(0, tokens, arguments.block):
        began, losses = time.perf_counter(), []
        for place in range(start, start + arguments.block, arguments.chunk):
            loss, cache = score_chunk(model, variables, *_cut(stream, place, arguments.chunk), cache, counts)
            losses.append(loss)
        mean = float(np.mean(jax.device_get(losses), dtype=np.float64))
        yield Block(mean, time.perf_counter() - began, read_status("self", "RssAnon"))


def make_cache(model: Transformer, variables: Any, way: str, arguments: Arguments) -> Cache:
    """An empty cache of the way's kind, for one row. `window` holds as many tokens as `sinks` does in all."""
    window, config = arguments.window or model.config.max_length, model.config
    if way == "full":
        cache = create_cache(config, 1, min(arguments.full_tokens, arguments.tokens))
    elif way == "window":
        cache = create_cache(config, 1, 0, kind="window", window=window + arguments.sinks)
    else:
        cache = create_cache(config, 1, 0, kind="sinks", sinks=arguments.sinks, window=window)
    # Where the weights lie, as what comes back does: else the second call would compile once more.
    return jax.device_put(cache, jax.tree.leaves(variables)[0].sharding)


def _cut(stream: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, the tokens that follow each), [1, count]."""
    return stream[None, start : start + count], stream[None, start + 1 : start + 1 + count]


def score_fresh_rows(model: Transformer, variables: Any, stream: np.ndarray, length: int) -> np.ndarray:
    """The loss [tokens] of every token of the stream but its first, in rows of `length` targets, each behind a BOS (the stream's first)."""
    targets = stream[1:]
    filled = np.pad(targets, (0, -len(targets) % (ROWS * length))).reshape(-1, ROWS, length)
    first = np.full((ROWS, 1), stream[0], stream.dtype)
    losses = [score_rows(model, variables, np.concatenate([first, part[:, :-1]], axis=1), part, length) for part in filled]
    return np.concatenate(losses).reshape(-1)[: len(targets)]


def describe_way(way: str, blocks: list[Block], cache_bytes: int | None, arguments: Arguments) -> dict[str, Any]:
    """A row of results: mean loss early and late, what a block took at both ends, and every block.

    A way that ends before the stream does has no late part, and is compared with nothing.
    """
    count = arguments.tokens // arguments.block
    begin, end = (place // arguments.block for place in arguments.early)
    early, late = (blocks[begin:end], blocks[count - (end - begin) :]) if len(blocks) == count else (None, None)
    row: dict[str, Any] = {"name": way, "tokens": len(blocks) * arguments.block, "cache_bytes": cache_bytes}
    for name, part in (("early", early), ("late", late)):
        if part is not None:
            row[f"{name}_loss"] = float(np.mean([block.loss for block in part]))
            row[f"{name}_seconds"] = _median([block.seconds for block in part])
            row[f"{name}_resident_bytes"] = _median([block.resident_bytes for block in part])
    if early is not None:
        row["late_over_early"] = row["late_loss"] / row["early_loss"]
    for name in ("loss", "seconds", "resident_bytes"):
        row[f"{name}_by_block"] = [getattr(block, name) for block in blocks]
    return row


def _median(values: list[Any]) -> float | None:
    return None if None in values else float(np.median(values))
