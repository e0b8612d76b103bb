"""Samples from a model.

    python sample.py --prompt "def read_"                      the newest run in runs/
    python sample.py --checkpoint DIR --prompt "..." ...       a run, a checkpoint of one, or a Hugging Face directory

The text, prompt first, goes to stdout as it is made, and nothing else does; what is loaded and how fast it ran goes to stderr.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from moejax.cli import parse, run_command
from moejax.config import UserError


@dataclass(frozen=True)
class Arguments:
    """Samples from a model."""

    prompt: str = "def read_"
    checkpoint: str | None = None  # a run, a checkpoint of one, or a Hugging Face directory; None: the newest run in runs/
    max_new_tokens: int = 128
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0
    ignore_eos: bool = False  # go on past the end of text
    dtype: str | None = None  # float32 or bfloat16; None: the checkpoint's


def main(argv: list[str]) -> None:
    """Reads the flags, finds the checkpoint, samples."""
    arguments = parse(argv, Arguments(), description=__doc__)
    from moejax.serving.engine import GenerationSettings

    settings = GenerationSettings(
        arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed, arguments.ignore_eos
    )
    path = Path(arguments.checkpoint) if arguments.checkpoint is not None else newest_run(Path("runs"))
    sample(path, arguments.prompt, settings, arguments.dtype)


def newest_run(runs: Path) -> Path:
    """The run whose newest complete checkpoint was written last. Raises UserError where there is none."""
    from moejax.checkpoint.store import latest_step

    candidates = [(step.stat().st_mtime, run) for run in sorted(runs.glob("*")) if (step := latest_step(run)) is not None]
    if not candidates:
        raise UserError(f"there is no finished run in {runs}/; train one with `python train.py`, or name a checkpoint with --checkpoint")
    return max(candidates)[1]


def sample(path: Path, prompt: str, settings, dtype: str | None) -> None:
    """Streams the prompt and its continuation to stdout."""
    import moejax
    from moejax.data.text import StreamDecoder
    from moejax.serving.engine import Engine

    started = time.perf_counter()
    model, variables, tokenizer = moejax.load(path, dtype=dtype)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer beside its weights; put its tokenizer.model there")
    note(f"{path}: {model.config.family}, loaded in {time.perf_counter() - started:.1f} s")
    sys.stdout.write(prompt)
    sys.stdout.flush()
    decoder = StreamDecoder(tokenizer, is_start=False)
    started, first, count = time.perf_counter(), 0.0, 0
    for (token,) in Engine(model, variables).stream([tokenizer.encode(prompt)], settings):
        first = first or time.perf_counter()
        count += 1
        sys.stdout.write(decoder.push(token) if token is not None else "")
        sys.stdout.flush()
    sys.stdout.write(decoder.finish() + "\n")
    if count > 1:
        rate = (count - 1) / (time.perf_counter() - first)
        note(f"{count} tokens; first after {first - started:.1f} s (compiling included), then {rate:.0f} tokens/s")


def note(line: str) -> None:
    """A line to stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
