"""Loss by length of context: the same tokens of held-out text, foreseen from windows of several lengths, under several RoPE scalings.

    python -m moejax.evals lengths --checkpoint runs/tiny --domain prose --scalings none linear:4 dynamic:4 yarn:4 --figure lengths.svg

A window of length L is a BOS (where the tokenizer has one) and the L - 1 tokens of a document behind it; the model is asked for the token
after each. Windows of all lengths end at the same places, and their last `scored` targets are the same tokens: what differs is how much
stands before them. Documents shorter than the longest window are left out, and no window reaches from one into the next.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import UserError
from moejax.evals.lengths_figure import draw_lengths
from moejax.evals.output import Output, load_model, report
from moejax.evals.scalings import OWN, original_length, parse_scaling, scale_model
from moejax.evals.scoring import score_rows
from moejax.evals.texts import find_run, read_held_out, read_text, trained_length

COLUMNS = ("nats_a_token", "standard_error", "bits_per_byte", "perplexity", "nats_all_positions", "seconds")


@dataclass(frozen=True)
class Arguments(Output):
    """Scores text with contexts of several lengths."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)  # tokens of a window
    scalings: tuple[str, ...] = (OWN,)  # of rotary positions: checkpoint (as it is), none, or KIND:FACTOR, as yarn:4
    domain: str | None = None  # of the run's held-out text; None: all of it
    text: str | None = None  # a file, a directory or builtin:NAME to be read instead
    max_megabytes: float = 4.0  # of that text
    scored: int = 128  # targets at the end of each window that lengths are compared by
    windows: int = 32  # windows of each length, spread evenly over all that the text has room for
    bins: int = 32  # stretches of the longest window that the loss by position is a mean over
    chunk: int = 512  # tokens of a row read at a time; any number gives the same
    batch_size: int = 8  # windows read together

    def __post_init__(self) -> None:
        for name in ("scored", "windows", "bins", "chunk", "batch_size", "max_megabytes"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if not self.lengths or min(self.lengths) < self.scored:
            raise UserError(f"lengths={self.lengths}; expected one length or more, none below scored={self.scored}")
        if not self.scalings:
            raise UserError(f"scalings is empty; name one or more, as {OWN} none yarn:4")
        for text in self.scalings:
            parse_scaling(text)
        if self.text is not None and self.domain is not None:
            raise UserError("text and domain were both given; leave one of them out")


@dataclass(frozen=True)
class Windows:
    """Rows that end at the same places whatever the length they are cut to: tokens and the token after each, [windows, longest]."""

    tokens: np.ndarray
    targets: np.ndarray

    def cut(self, length: int, first: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets) [windows, length]; the first token is `first` where there is one."""
        tokens, targets = self.tokens[:, -length:].copy(), self.targets[:, -length:]
        if first is not None:
            tokens[:, 0] = first
        return tokens, targets


def run(arguments: Arguments) -> None:
    """Scores, reports and draws."""
    started = time.perf_counter()
    run_config = find_run(str(arguments.checkpoint))
    model, variables, tokenizer = load_model(arguments)
    trained = trained_length(model.config, run_config)
    texts = choose_texts(arguments, run_config, tokenizer)
    windows = choose_windows(tokenizer.encode_batch(texts), max(arguments.lengths), arguments.scored, arguments.windows)
    rows = []
    for scaling in arguments.scalings:
        scaled = scale_model(model, parse_scaling(scaling), trained)
        for length in sorted(arguments.lengths):
            rows.append(measure_length(scaled, variables, tokenizer, windows, length, arguments) | {"scaling": scaling})
            rows[-1] = {"name": f"{scaling}, {length}", **rows[-1]}
    sizes = {name: getattr(arguments, name) for name in ("scored", "chunk", "domain", "text")}
    result = {
        **sizes,
        "windows": len(windows.tokens),
        "trained_length": trained,
        "original_length": original_length(model.config, trained),
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    whole = report("lengths", result, arguments, COLUMNS)
    if arguments.figure is not None:
        draw_lengths(whole, Path(arguments.figure))


def choose_texts(arguments: Arguments, run_config: Any, tokenizer: Any) -> list[str]:
    """The documents to be scored. Raises UserError for a domain that the run does not have."""
    if arguments.text is not None:
        return [document.text for document in read_text(arguments.text, int(arguments.max_megabytes * 1e6))]
    domains = read_held_out(str(arguments.checkpoint), run_config, tokenizer)
    if arguments.domain is not None and arguments.domain not in domains:
        raise UserError(f"domain={arguments.domain!r} is none of the run's; expected one of {', '.join(domains)}")
    return [document.text for name, documents in domains.items() if arguments.domain in (None, name) for document in documents]


def choose_windows(documents: Sequence[Sequence[int]], longest: int, scored: int, count: int) -> Windows:
    """`count` windows of `longest` tokens, or as many as there are, whose last `scored` targets are no two times the same.

    A window's targets are tokens of a document; its inputs are those before them. Raises UserError where no document is so long.
    """
    places = [(number, end) for number, ids in enumerate(documents) for end in range(longest + 1, len(ids) + 1, scored)]
    if not places:
        found = max(map(len, documents), default=0)
        raise UserError(
            f"lengths has {longest:,}, but the longest document has {found:,} tokens, and one more than the length is needed; ask for "
            "shorter ones, or name another text with --text"
        )
    taken = [places[place * len(places) // count] for place in range(count)] if len(places) > count else places
    rows = np.array([documents[number][end - longest - 1 : end] for number, end in taken], np.int32)
    return Windows(rows[:, :-1], rows[:, 1:])


def measure_length(model: Any, variables: Any, tokenizer: Any, windows: Windows, length: int, arguments: Arguments) -> dict[str, Any]:
    """A row of results: losses of windows of one length, at their end, over all of them, and by position."""
    started = time.perf_counter()
    tokens, targets = windows.cut(length, tokenizer.bos_token_id)
    losses = score_windows(model, variables, tokens, targets, arguments.chunk, arguments.batch_size)
    ends = losses[:, -arguments.scored :]
    spelled = sum(len(tokenizer.decode(row.tolist(), is_start=False).encode()) for row in targets[:, -arguments.scored :])
    mean = float(np.mean(ends))
    edges = np.unique(np.linspace(0, length, min(arguments.bins, length) + 1).astype(int))
    return {
        "length": length,
        "nats_a_token": mean,
        # Tokens of one window are not independent of each other; windows nearly are.
        "standard_error": float(np.std(np.mean(ends, axis=1), ddof=1) / math.sqrt(len(ends))) if len(ends) > 1 else None,
        "bits_per_byte": float(np.sum(ends)) / math.log(2) / spelled,
        "perplexity": math.exp(min(mean, 700.0)),
        "nats_all_positions": float(np.mean(losses)),
        "positions": [float(stop) for stop in edges[1:]],
        "nats_by_position": [float(np.mean(losses[:, start:stop])) for start, stop in itertools.pairwise(edges)],
        "seconds": time.perf_counter() - started,
    }


def score_windows(model: Any, variables: Any, tokens: np.ndarray, targets: np.ndarray, chunk: int, batch_size: int) -> np.ndarray:
    """-log p of each target in nats, float64 [windows, T]; the last batch is filled up, so that all have one shape."""
    parts = []
    for start in range(0, len(tokens), batch_size):
        missing = max(start + batch_size - len(tokens), 0)
        some, wanted = (np.pad(ids[start : start + batch_size], ((0, missing), (0, 0))) for ids in (tokens, targets))
        parts.append(score_rows(model, variables, some, wanted, chunk)[: batch_size - missing])
    return np.concatenate(parts).astype(np.float64)
