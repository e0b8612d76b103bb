"""Samples from a model.

    python sample.py --prompt "def read_"                      the newest run in runs/
    python sample.py --checkpoint DIR --prompt "..." ...       a run, a checkpoint, a published model's directory, or its id on the Hub
    python sample.py --checkpoint DIR --chat                   a conversation, in the model's own chat format; /help shows its commands
    python sample.py --prompts IN.jsonl --out OUT.jsonl        a file of prompts, a line for a line; goes on where it was stopped
    python sample.py --stream-forever --cache.kind sinks       text without end, in constant memory, until Ctrl-C
    python sample.py --checkpoint DIR --plan v5p:4x4x4         what serving it takes on TPUs that need not be here: memory, tokens/s

The text, prompt first (in a conversation the replies), goes to stdout as it is made, and nothing else does; what is loaded and how fast
it ran goes to stderr. Lines of IN.jsonl hold "prompt", "messages" or "tokens", and any of the fields below from max_new_tokens to
prompt_logprobs, which then count for that line.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moejax.cache_config import CacheConfig
from moejax.cli import load_config, parse, run_command
from moejax.config import MeshConfig, ModelConfig, UserError
from moejax.generation_config import GenerationSettings
from moejax.launch import prepare_process

ONE_DEVICE = MeshConfig(fsdp=1)
ENDLESS = 2**31 - 1  # tokens: what the device's counter holds


@dataclass(frozen=True)
class Arguments:
    """Samples from a model."""

    prompt: str | None = None  # None: "def read_"; with --chat, the first message
    checkpoint: str | None = None  # a run, a checkpoint, a published model; None: the newest run in runs/
    max_new_tokens: int = 128
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # tokens less likely than this times the most likely one are left out; 0: off
    repetition_penalty: float = 1.0  # logits of tokens that were there are divided by it where positive, else multiplied; 1: off
    frequency_penalty: float = 0.0  # taken off a token's logit for each time it was generated
    presence_penalty: float = 0.0  # taken off once
    logit_bias: tuple[str, ...] = ()  # ID:VALUE, as 17:-2.5; added to that token's logit
    stop: tuple[str, ...] = ()  # texts before the first of which the text ends
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    ignore_eos: bool = False  # go on past the end of text
    logprobs: int | None = None  # with --prompts: log-probabilities of the tokens made and of this many most likely ones
    prompt_logprobs: int | None = None  # with --prompts: the same of the prompt's tokens
    prompts: str | None = None  # a JSONL file of prompts
    out: str | None = None  # the JSONL file that answers it
    batch_size: int = 8  # with --prompts and --plan: how many are continued side by side
    dtype: str | None = None  # float32 or bfloat16; None: the checkpoint's, of a plan bfloat16
    stream_forever: bool = False  # go on until Ctrl-C, past the end of text, with a cache that forgets
    cache: CacheConfig = field(default_factory=CacheConfig)  # what is kept of the tokens read
    chat: bool = False  # hold a conversation: a line of stdin is a message
    mesh: MeshConfig = field(default_factory=lambda: ONE_DEVICE)  # devices that share the model, as in training: --mesh.tensor 8
    chat_format: str | None = None  # mistral-v1, mistral-v3 or arctic; None: the one that came with the tokenizer
    plan: str | None = (
        None  # compile for this topology (v5p:4x4x4, v6e:4x4, local) and tell, weights never read; --checkpoint may be a config file
    )
    plan_json: str | None = None  # the file that the plan is written to; - prints it and nothing else
    plan_context: int = 4096  # slots of the cache that the plan is for, a row
    plan_dispatch: str | None = None  # how tokens of the plan reach their experts (docs/meshes.md), auto drops none; None: the model's own


def main(argv: list[str]) -> None:
    """Reads the flags, finds the checkpoint, samples."""
    arguments = parse(argv, Arguments(), description=__doc__)
    check_combination(arguments)
    settings = make_settings(arguments)
    if arguments.plan is not None:
        return make_plan(arguments.plan, arguments)
    path = Path(arguments.checkpoint) if arguments.checkpoint is not None else newest_run(Path("runs"))
    if arguments.prompts is not None and arguments.out is not None:
        return complete_prompts(path, Path(arguments.prompts), Path(arguments.out), arguments, settings)
    model, variables, tokenizer = load(path, arguments)
    if arguments.chat:
        from moejax.serving.chat import Conversation, converse

        converse(Conversation(model, variables, tokenizer, settings, arguments.cache), arguments.prompt)
    else:
        from moejax.serving.engine import Engine

        engine = Engine(model, variables, tokenizer=tokenizer, cache=arguments.cache)
        sample(engine, tokenizer, "def read_" if arguments.prompt is None else arguments.prompt, settings)


def check_combination(arguments: Arguments) -> None:
    """Raises UserError for flags that have nothing to say to each other."""
    if arguments.chat and arguments.ignore_eos:
        raise UserError("--chat and --ignore-eos exclude each other: a reply ends at the end of text; leave one out")
    if arguments.chat_format is not None and not arguments.chat and arguments.prompts is None:
        raise UserError(f"--chat-format {arguments.chat_format} is for conversations; add --chat, or --prompts with messages")
    if (arguments.prompts is None) != (arguments.out is None):
        raise UserError("--prompts and --out belong together: the file of prompts, and the file that answers it; add the other one")
    if arguments.prompts is not None and (arguments.chat or arguments.prompt is not None):
        raise UserError("--prompts excludes --prompt and --chat: the prompts are the file's; leave one out")
    if arguments.prompts is None and (arguments.logprobs, arguments.prompt_logprobs) != (None, None):
        raise UserError("--logprobs and --prompt-logprobs are written to --out; add --prompts and --out")
    if arguments.stream_forever and (arguments.chat or arguments.prompts is not None):
        raise UserError("--stream-forever excludes --chat and --prompts: it never comes to the end of one text; leave one out")
    if arguments.stream_forever and arguments.cache.kind == "full":
        raise UserError("--stream-forever needs a cache that forgets, --cache.kind full keeps every token; add --cache.kind sinks")
    check_plan(arguments)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size} must be at least 1")


def check_plan(arguments: Arguments) -> None:
    """Raises UserError for what is wrong with a plan and can be seen before jax is imported."""
    from moejax.planning.topology import check_name

    if arguments.plan is None:
        for flag, value in (("--plan-json", arguments.plan_json), ("--plan-dispatch", arguments.plan_dispatch)):
            if value is not None:
                raise UserError(f"{flag} {value} says how a plan is made; add --plan, as --plan v5p:4x4x4")
        return
    check_name(arguments.plan)
    if arguments.chat or arguments.stream_forever or arguments.prompts is not None or arguments.prompt is not None:
        raise UserError("--plan excludes --prompt, --prompts, --chat and --stream-forever: nothing is sampled; leave them out")
    if arguments.plan_context < 1:
        raise UserError(f"--plan-context {arguments.plan_context} must be at least 1")
    if arguments.dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {arguments.dtype} of a plan must be float32, bfloat16 or float16")


def make_plan(name: str, arguments: Arguments) -> None:
    """Compiles prefill and decode for a topology, tells and writes what they take."""
    from moejax.planning.topology import open_topology
    from moejax.results import deliver, require_place

    if arguments.plan_json not in (None, "-"):
        require_place(str(arguments.plan_json), "--plan-json")
    dtype: Any = arguments.dtype or "bfloat16"
    config = read_config(arguments.checkpoint)
    dispatch: Any = arguments.plan_dispatch or config.dispatch
    config = replace(config, dtype=dtype, param_dtype=dtype, dispatch=dispatch)
    topology = open_topology(name)
    import jax

    import moejax
    from moejax.planning.compiled import describe_versions
    from moejax.serving.engine import CHUNK
    from moejax.serving.plan import plan_serving
    from moejax.serving.plan_text import tell_plan

    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there has no schedule to read

    mesh = None if arguments.mesh == ONE_DEVICE else arguments.mesh
    plan = plan_serving(config, mesh, topology, arguments.batch_size, arguments.plan_context, CHUNK, arguments.cache)
    deliver(plan | {"moejax": moejax.__version__} | describe_versions(), tell_plan(plan), arguments.plan_json)


def read_config(checkpoint: str | None) -> ModelConfig:
    """The configuration of a config file, of a checkpoint's directory, or of the newest run, no weight read. Raises UserError without."""
    if checkpoint is not None and checkpoint.endswith(".py"):
        return load_config(Path(checkpoint), Path(__file__).parent / "configs")[0].model
    path = Path(checkpoint) if checkpoint is not None else newest_run(Path("runs"))
    if not path.is_dir():
        raise UserError(f"--checkpoint {path}: there is no such directory; a plan takes one, or a config file as configs/arctic_480b.py")
    from moejax.checkpoint.detect import find_checkpoint

    return find_config(*find_checkpoint(path))


def find_config(kind: str, directory: Path) -> ModelConfig:
    """The configuration of a checkpoint. A format that is not read is refused by its name, before anything is missed beside it."""
    from moejax.checkpoint.source import open_source
    from moejax.checkpoint.store import read_metadata

    if kind == "moejax":
        return read_metadata(directory).config
    with open_source(directory) as source:
        return source.config


def make_settings(arguments: Arguments) -> GenerationSettings:
    """The flags as GenerationSettings. Raises UserError for values that make no sense."""
    bias = {}
    for text in arguments.logit_bias:
        id, _, value = text.partition(":")
        try:
            bias[int(id)] = float(value)
        except ValueError:
            raise UserError(f"--logit-bias {text}: expected ID:VALUE, as 17:-2.5") from None
    values = {item.name: getattr(arguments, item.name) for item in fields(GenerationSettings)}
    if arguments.stream_forever:
        values |= {"max_new_tokens": ENDLESS, "ignore_eos": True}
    return GenerationSettings(**{**values, "logit_bias": bias})


def complete_prompts(path: Path, prompts: Path, out: Path, arguments: Arguments, settings: GenerationSettings) -> None:
    """Continues a file of prompts. Raises UserError for a bad line before anything is loaded."""
    from moejax.serving.prompt_file import complete_file, count_answered, read_requests

    model_name = str(path) if arguments.cache == CacheConfig() else f"{path} {arguments.cache}"  # what makes the answers what they are
    requests = read_requests(prompts, settings, model_name)
    if count_answered(out, requests) == len(requests):
        return note(f"{out}: all {len(requests)} are answered already")

    def check(tokenizer: Any, vocab_size: int) -> None:
        for request in requests:
            request.encode(tokenizer, vocab_size)

    model, variables, tokenizer = load(path, arguments, check)
    from moejax.serving.engine import Engine

    engine = Engine(model, variables, tokenizer=tokenizer, cache=arguments.cache)
    complete_file(engine, tokenizer, requests, out, arguments.batch_size, note)


def newest_run(runs: Path) -> Path:
    """The run whose newest complete checkpoint was written last. Raises UserError where there is none."""
    from moejax.checkpoint.store import latest_step

    candidates = [(step.stat().st_mtime, run) for run in sorted(runs.glob("*")) if (step := latest_step(run)) is not None]
    if not candidates:
        raise UserError(f"there is no finished run in {runs}/; train one with `python train.py`, or name a checkpoint with --checkpoint")
    return max(candidates)[1]


def load(path: Path, arguments: Arguments, check: Callable[[Any, int], None] = lambda tokenizer, vocab_size: None) -> tuple[Any, Any, Any]:
    """(model, variables, tokenizer). Raises UserError, where possible before weights are read, without a tokenizer or a way to chat.

    `check(tokenizer, vocab_size)` may refuse, too.
    """
    import moejax
    from moejax.checkpoint.detect import find_checkpoint
    from moejax.data.text import find_tokenizer
    from moejax.sharding import mesh_of

    if path.is_dir():
        kind, directory = find_checkpoint(path)
        config = find_config(kind, directory)
        check(choose_tokenizer(path, find_tokenizer(directory) or find_tokenizer(path), arguments), config.vocab_size)
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


def sample(engine: Any, tokenizer: Any, prompt: str, settings: GenerationSettings) -> None:
    """Streams the prompt and its continuation to stdout. Ctrl-C ends a text without end as a limit would, and any other one as ever."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    started, first, count = time.perf_counter(), 0.0, 0
    try:
        for (made,) in engine.follow([tokenizer.encode(prompt)], settings):
            first = first or time.perf_counter()
            count += len(made.tokens)
            sys.stdout.write(made.take())
            sys.stdout.flush()
    except KeyboardInterrupt:
        if settings.max_new_tokens != ENDLESS:
            raise
    sys.stdout.write("\n")
    if count > 1:
        rate = (count - 1) / (time.perf_counter() - first)
        note(f"{count} tokens; first after {first - started:.1f} s (compiling included), then {rate:.0f} tokens/s")


def note(line: str) -> None:
    """A line to stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    prepare_process()
    run_command(main)
