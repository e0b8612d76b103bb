"""moejax-data prepare CONFIG.py [--workers N] [--data.path DIR ...]: tokenises what a run will read, and stops.

The tokens go into the cache (--data.cache-dir, else $MOEJAX_CACHE, else ~/.cache/moejax), where train.py finds them. A command that was
stopped goes on where it was when it is given again. Every field of the run is a flag, as with train.py.
"""

import time
from pathlib import Path

from moejax.cli import parse_run, run_command
from moejax.config import RunConfig, UserError

USAGE = "moejax-data prepare CONFIG.py [--workers N] [--data.path DIR ...]"


def run(argv: list[str]) -> None:
    """Prepares what the config and its flags name. Raises UserError for text that cannot be used, and for another command."""
    if not argv or argv[0] not in ("prepare", "-h", "--help"):
        got = repr(argv[0]) if argv else "nothing"
        raise UserError(f"got the command {got}; expected prepare: {USAGE}")
    if argv[0] != "prepare" or len(argv) == 1:
        print(__doc__)
        return
    words = [f"--data.{word[2:]}" if word.partition("=")[0] == "--workers" else word for word in argv[1:]]
    config, path, *_ = parse_run(words, Path("configs", "tiny.py"))
    prepare_run(config)
    print(f"ready to train: python train.py {path}", flush=True)


def prepare_run(config: RunConfig) -> None:
    """Makes the entries of the cache that a run of this config will look for."""
    from moejax.data.prepare import prepare_entries
    from moejax.data.text import find_tokenizer

    def log(line: str) -> None:
        print(line, flush=True)

    given = vocab_size = None
    if config.init_from is None:
        vocab_size = config.model.vocab_size
    elif config.data.tokenizer is None:  # sizes are then the checkpoint's, and so is the tokenizer
        given = find_tokenizer(config.init_from)
        if given is None:
            raise UserError(f"no tokenizer found in init_from={config.init_from!r}; name one with --data.tokenizer")
    started = time.monotonic()
    _, entries = prepare_entries(config.data, vocab_size, Path(config.directory), log, given, keep_tokenizer=False)
    text = sum(entry.index["bytes"] for entry in entries.values())
    tokens = sum(entry.tokens for entry in entries.values())
    log(f"{len(entries)} domains, {text / 1e6:,.2f} MB of text, {tokens / 1e6:,.2f} M tokens, in {time.monotonic() - started:.1f} s")


def main() -> None:
    """The console script."""
    run_command(run)


if __name__ == "__main__":
    main()
