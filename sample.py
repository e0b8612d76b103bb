"""Samples from a model.

    python sample.py --prompt "def read_"                      the newest run in runs/
    python sample.py --checkpoint DIR --prompt "..." ...       a run, a checkpoint, a published model's directory, or its id on the Hub
    python sample.py --checkpoint DIR --chat                   a conversation, in the model's own chat format; /help shows its commands

The text, prompt first (in a conversation the replies), goes to stdout as it is made, and nothing else does; what is loaded and how fast
it ran goes to stderr.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.cli import parse, run_command
from moejax.config import MeshConfig, UserError
from moejax.launch import prepare_process

ONE_DEVICE = MeshConfig(fsdp=1)


@dataclass(frozen=True)
class Arguments:
    """Samples from a model."""

    prompt: str | None = None  # None: "def read_"; with --chat, the first message
    checkpoint: str | None = None  # a run, a checkpoint, a published model; None: the newest run in runs/
    max_new_tokens: int = 128
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0
    ignore_eos: bool = False  # go on past the end of text
    dtype: str | None = None  # float32 or bfloat16; None: the checkpoint's
    chat: bool = False  # hold a conversation: a line of stdin is a message
    mesh: MeshConfig = field(default_factory=lambda: ONE_DEVICE)  # devices that share the model, as in training: --mesh.tensor 8
    chat_format: str | None = None  # mistral-v1, mistral-v3 or arctic; None: the one that came with the tokenizer


def main(argv: list[str]) -> None:
    """Reads the flags, finds the checkpoint, samples."""
    arguments = parse(argv, Arguments(), description=__doc__)
    if arguments.chat and arguments.ignore_eos:
        raise UserError("--chat and --ignore-eos exclude each other: a reply ends at the end of text; leave one out")
    if arguments.chat_format is not None and not arguments.chat:
        raise UserError(f"--chat-format {arguments.chat_format} is for conversations; add --chat")
    from moejax.serving.engine import GenerationSettings

    settings = GenerationSettings(
        arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed, arguments.ignore_eos
    )
    path = Path(arguments.checkpoint) if arguments.checkpoint is not None else newest_run(Path("runs"))
    model, variables, tokenizer = load(path, arguments)
    if arguments.chat:
        from moejax.serving.chat import Conversation, converse

        converse(Conversation(model, variables, tokenizer, settings), arguments.prompt)
    else:
        sample(model, variables, tokenizer, "def read_" if arguments.prompt is None else arguments.prompt, settings)


def newest_run(runs: Path) -> Path:
    """The run whose newest complete checkpoint was written last. Raises UserError where there is none."""
    from moejax.checkpoint.store import latest_step

    candidates = [(step.stat().st_mtime, run) for run in sorted(runs.glob("*")) if (step := latest_step(run)) is not None]
    if not candidates:
        raise UserError(f"there is no finished run in {runs}/; train one with `python train.py`, or name a checkpoint with --checkpoint")
    return max(candidates)[1]


def load(path: Path, arguments: Arguments) -> tuple[Any, Any, Any]:
    """(model, variables, tokenizer). Raises UserError, where possible before weights are read, without a tokenizer or a way to chat."""
    import moejax
    from moejax.checkpoint.detect import find_checkpoint
    from moejax.checkpoint.source import open_source
    from moejax.data.text import find_tokenizer
    from moejax.sharding import mesh_of

    if path.is_dir():
        kind, directory = find_checkpoint(path)
        if kind != "moejax":
            with open_source(directory):
                pass  # a format that is not read is refused by its name, before anything is missed beside it
        choose_tokenizer(path, find_tokenizer(directory) or find_tokenizer(path), arguments)
    started = time.perf_counter()
    mesh = None if arguments.mesh == ONE_DEVICE else mesh_of(arguments.mesh)
    model, variables, tokenizer = moejax.load(path, mesh, dtype=arguments.dtype)
    note(f"{path}: {model.config.family}, loaded in {time.perf_counter() - started:.1f} s")
    return model, variables, choose_tokenizer(path, tokenizer, arguments)


def choose_tokenizer(path: Path, tokenizer: Any, arguments: Arguments) -> Any:
    """The tokenizer, with the chat format asked for. Raises UserError where there is none, of the one or of the other."""
    from moejax.data.chat import CHAT_FORMATS, check_chat_format

    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer beside its weights; put its tokenizer.model there")
    if arguments.chat_format is not None:
        check_chat_format(arguments.chat_format, tokenizer)
        tokenizer.chat_format = arguments.chat_format
    if arguments.chat and tokenizer.chat_format is None:
        raise UserError(
            f"{path} has no chat format, as base models and runs of one's own have none; sample with --prompt, or, where the model "
            f"was tuned for one, name it with --chat-format (known: {', '.join(CHAT_FORMATS)})"
        )
    return tokenizer


def sample(model: Any, variables: Any, tokenizer: Any, prompt: str, settings: Any) -> None:
    """Streams the prompt and its continuation to stdout."""
    from moejax.data.text import StreamDecoder
    from moejax.serving.engine import Engine

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
    prepare_process()
    run_command(main)
