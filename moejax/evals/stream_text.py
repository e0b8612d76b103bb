"""One long text to be read without end: what a run held out of its training, its domains spread evenly over the whole."""

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moejax.checkpoint.detect import find_checkpoint
from moejax.checkpoint.hub import locate
from moejax.checkpoint.store import STEPS, read_metadata
from moejax.config import Domain, RunConfig, UserError, run_from_json
from moejax.data.documents import Document, Reading
from moejax.data.prepare import prepare_entries
from moejax.data.sources import read_documents
from moejax.data.text import Tokenizer

CHARACTERS_A_TOKEN = 16  # more than text has: what is read of --text is enough


def find_run(checkpoint: str) -> RunConfig | None:
    """The configuration of the run that a checkpoint is of; None for one that is of none (converted, published)."""
    kind, directory = find_checkpoint(locate(checkpoint)[0])
    run = read_metadata(directory).run if kind == "moejax" else None
    return None if run is None else run_from_json(run, str(directory))


def read_held_out(checkpoint: str, run: RunConfig | None, tokenizer: Tokenizer) -> dict[str, list[Document]]:
    """What the run held out, by domain, from the cache of its tokens or from its text again. Raises UserError where there is no run."""
    if run is None:
        raise UserError(f"checkpoint={checkpoint!r} is of no run of ours, so nothing was held out; name a text it has not seen with --text")
    place = Path(checkpoint).absolute()
    directory = place.parent.parent if place.parent.name == STEPS else place  # that of the run, which says what text it has seen
    entries = prepare_entries(run.data, None, directory, _say, tokenizer, keep_tokenizer=False)[1]
    return {name: entry.held_out() for name, entry in entries.items()}


def read_text(path: str, tokens: int) -> dict[str, list[Document]]:
    """The documents of a file, a directory or a builtin text, as many as `tokens` tokens can need. Raises UserError as sources do."""
    return {"text": list(read_documents(Domain("text", path), CHARACTERS_A_TOKEN * tokens, 0, Reading()))}


def spread_evenly(domains: Mapping[str, Sequence[Document]], tokenizer: Tokenizer, tokens: int, piece: int, seed: int = 0) -> np.ndarray:
    """Token ids [tokens], in pieces of `piece` tokens drawn from all documents, each domain's spread evenly over the whole.

    Any long stretch is then of the same kind of text as any other. A domain has the share that it has of all text. No BOS and no EOS
    stand in it. Raises UserError where there is less text.
    """
    drawn = random.Random(seed)
    placed: list[tuple[float, str, list[int]]] = []
    pieces: dict[str, list[list[int]]] = {}
    for name, documents in domains.items():
        encoded = tokenizer.encode_batch([document.text for document in documents])
        pieces[name] = [ids[start : start + piece] for ids in encoded for start in range(0, len(ids) - piece + 1, piece)]
        drawn.shuffle(pieces[name])
    found = piece * sum(map(len, pieces.values()))
    if found < tokens:
        raise UserError(
            f"tokens={tokens:,}, but the text has only {found:,} in whole pieces of {piece}; ask for fewer, let the text repeat with "
            "--period, name a longer one with --text, or train with a larger --data.held-out-fraction"
        )
    for name, own in pieces.items():
        used = own[: -(-len(own) * tokens // found)]
        placed += [((place + 0.5) / len(used), name, ids) for place, ids in enumerate(used)]
    joined = [id for *_, ids in sorted(placed) for id in ids]
    return np.array(joined[:tokens], np.int32)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
