"""What evaluations read: the run that a checkpoint is of, the text it held out, or any other text."""

import sys
from pathlib import Path

from moejax.checkpoint.detect import find_checkpoint
from moejax.checkpoint.hub import locate
from moejax.checkpoint.store import STEPS, read_metadata
from moejax.config import Domain, ModelConfig, RunConfig, UserError, run_from_json
from moejax.data.documents import Document, Reading
from moejax.data.prepare import prepare_entries
from moejax.data.sources import read_documents
from moejax.data.text import Tokenizer


def find_run(checkpoint: str) -> RunConfig | None:
    """The configuration of the run that a checkpoint is of; None for one that is of none (converted, published)."""
    kind, directory = find_checkpoint(locate(checkpoint)[0])
    run = read_metadata(directory).run if kind == "moejax" else None
    return None if run is None else run_from_json(run, str(directory))


def trained_length(config: ModelConfig, run: RunConfig | None) -> int:
    """Tokens of the rows that a model has seen, as far as one can know: those of its run, else what its configuration is meant for."""
    return config.max_length if run is None else min(run.data.sequence_length, config.max_length)


def read_held_out(checkpoint: str, run: RunConfig | None, tokenizer: Tokenizer) -> dict[str, list[Document]]:
    """What the run held out, by domain, from the cache of its tokens or from its text again. Raises UserError where there is no run."""
    if run is None:
        raise UserError(f"checkpoint={checkpoint!r} is of no run of ours, so nothing was held out; name a text it has not seen with --text")
    place = Path(checkpoint).absolute()
    directory = place.parent.parent if place.parent.name == STEPS else place  # that of the run, which says what text it has seen
    entries = prepare_entries(run.data, None, directory, _say, tokenizer, keep_tokenizer=False)[1]
    return {name: entry.held_out() for name, entry in entries.items()}


def read_text(path: str, max_bytes: int) -> list[Document]:
    """The documents of a file, a directory or a builtin text, up to so many bytes. Raises UserError as sources do."""
    return list(read_documents(Domain("text", path), max_bytes, 0, Reading()))


def _say(line: str) -> None:
    print(line, file=sys.stderr)
