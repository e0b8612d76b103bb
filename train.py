"""Trains a model.

    python train.py                                          configs/tiny.py, a small Arctic-style model on text this machine has
    python train.py configs/x.py --train.steps 20 ...        another config, any field overridden
    python train.py configs/finetune.py --init-from DIR --data.path my.jsonl      goes on from a checkpoint's weights, docs/finetuning.md
    python train.py configs/arctic_480b.py --summary         what the model is made of; nothing is allocated
    python train.py configs/arctic_480b.py --data-plan       what is read when: stages, domains, tokens, epochs; nothing is prepared
    python train.py configs/arctic_480b.py --plan v5p:8x8x16     memory, time and communication there, from its compiled step; docs/plans

The run lives in runs/<name> (or --run-dir): config.json, data.json, tokenizer.model, metrics.jsonl, checkpoints/ and more
(docs/training.md). The same command goes on where the run stopped; `moejax-report runs/<name>` makes a page of it. Several hosts run the
same command each: docs/meshes.md.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.cli import parse_run, run_command
from moejax.config import MeshConfig, RunConfig, UserError
from moejax.distributed import ending_together, is_first, join_processes
from moejax.launch import prepare_process

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moejax.data.prepare import Prepared
    from moejax.training.evaluation import EvaluationSet
    from moejax.training.initial import Start

HERE = Path(__file__).resolve().parent
FLAGS = {
    "--summary": "print the parameters by kind of module, and stop",
    "--data-plan": "print stages, domains, tokens and epochs, and stop",
    "--plan TOPOLOGY": "compile the step for v5p:8x8x16, 2*v5p:8x8x8 (slices), local ...; print memory, time, communication; stop",
    "--plan-search [SECONDS]": "with --plan: try meshes and remat policies for so long (600), and print which are worth having",
    "--plan-json FILE": "with --plan: write what it found there too",
}


def main(argv: list[str]) -> None:
    """Reads the configuration; trains, or prints what a flag asks for."""
    is_asked = any(token.partition("=")[0] in ("--plan", "--summary") for token in argv)
    config, _, flags, values = parse_run(argv, HERE / "configs" / "tiny.py", FLAGS, functools.partial(complete, needs_weights=not is_asked))
    if "--summary" in flags:
        from moejax.families.counts import summarise

        print(summarise(config.model))
    if "--data-plan" in flags:
        from moejax.data.plan import describe_plan
        from moejax.data.prepare import find_prepared_tokens

        print(describe_plan(config, find_prepared_tokens(config.data, config.model.vocab_size, Path(config.directory))))
    if values:
        import moejax
        from moejax.training.plan_command import plan

        plan(config, values, moejax.__version__)
    if flags or values:
        return
    join_processes(config.distributed)
    with ending_together(), explaining_full_disk(config):
        from moejax.training.saving import steps_to_take

        train(replace(config, train=replace(config.train, steps=steps_to_take(config))))


def complete(config: RunConfig, needs_weights: bool = True) -> RunConfig:
    """The model's section from the checkpoint that the run begins with, where the config leaves it open."""
    if config.init_from is None:
        return config
    from moejax.training.initial import complete_config

    return complete_config(config, needs_weights)


def train(config: RunConfig) -> None:
    """The main job, in a directory that is this process's alone, or that of the processes it is the first of."""
    began = time.perf_counter()
    from moejax.families import get_family
    from moejax.sharding import mesh_of
    from moejax.training import initial
    from moejax.training.run_directory import hold_run_directory
    from moejax.training.trackers import require_wandb

    get_family(config.model.family)
    require_wandb(config)
    start = initial.find_start(config)
    if config.mesh != MeshConfig():  # one that the devices cannot be is answered before text is read; the default one always works
        mesh_of(config.mesh, config.model)
    with hold_run_directory(config, log) if is_first() else contextlib.nullcontext():
        train_from(config, start, began)


def train_from(config: RunConfig, start: "Start | None", began: float) -> None:
    """Data, model, loop, evaluation, a sample."""
    from moejax.data import batches, curriculum
    from moejax.training import initial

    directory = Path(config.directory)
    data = prepare_data(config, directory, start)
    sizes = {name: len(rows) for name, rows in data.rows.items()}
    for line in curriculum.describe_repeats(config.data, sizes, config.train.batch_size, config.steps):
        log(line)
    # Only now what compiles and what touches the device: mistakes so far were answered at once.
    from moejax.model.transformer import Transformer
    from moejax.sharding import mesh_of
    from moejax.training.curriculum_figure import draw_curriculum
    from moejax.training.loop import Trainer
    from moejax.training.placement import rows_of_process

    mesh = mesh_of(config.mesh, config.model)
    process, processes = rows_of_process(mesh, config.train.batch_size)
    batches_from = functools.partial(
        batches.batches_from, config.data, data.rows, config.train.batch_size, process_index=process, process_count=processes
    )
    evaluation = {name: evaluation_set(config, data.tokenizer, documents) for name, documents in data.held_out.items()}
    write_extra = initial.companion_writer(directory, data.tokenizer)
    load_weights = None if start is None else lambda: load_initial_weights(config, mesh)
    trainer = Trainer(config, Transformer(config.model, mesh), batches_from, evaluation, write_extra, log, load_weights, began)
    state = trainer.restore_or_create()
    if int(state.step) >= config.steps:
        log(
            f"{directory} is done: it has trained for {int(state.step)} steps. Train longer with --train.steps, or elsewhere with --run-dir"
        )
    state = trainer.run(state)
    bits_per_byte = trainer.evaluate(state)
    if is_first():
        report(config, bits_per_byte, data.held_out)
        draw_curriculum(directory, config, directory / "curriculum.png", log)
    print_sample(config, trainer.model, state.params, data.tokenizer)


def prepare_data(config: RunConfig, directory: Path, start: "Start | None") -> "Prepared":
    """The run's directory and its data; several processes take turns, and the others find what the first has made."""
    from moejax.checkpoint.processes import first_before_others, require_alike
    from moejax.data.prepare import prepare
    from moejax.training import initial
    from moejax.training.run_directory import claim_run_directory, require_shared

    with first_before_others("prepared"):
        if not is_first():
            require_shared(directory)
        else:
            claim_run_directory(config)
            if start is not None:
                initial.keep_companions(start, directory)
            elif config.init_from:
                log(f"{directory} goes on from its own checkpoint; {config.init_from} is not read again (another --run-dir starts anew)")
        data = prepare(config.data, config.model.vocab_size, directory, log, start and start.tokenizer)
    require_alike("the text of the data domains gives other tokens", data.checksums)
    return data


def load_initial_weights(config: RunConfig, mesh: "Mesh | None") -> Any:
    """The weights of `init_from`, in the run's dtype and layout."""
    import moejax
    from moejax.model.transformer import stack_layers, unstack_layers

    log(f"beginning with the weights of {config.init_from}")
    model, variables, _ = moejax.load(str(config.init_from), mesh, dtype=config.model.param_dtype)
    stacked = variables["params"] if model.config.scan_layers else stack_layers(variables["params"], model.config)
    return stacked if config.model.scan_layers else unstack_layers(stacked, config.model)


@contextlib.contextmanager
def explaining_full_disk(config: RunConfig) -> Iterator[None]:
    """Raises UserError where a write within it found no room (metrics, tokenizer); checkpoints say so themselves."""
    try:
        yield
    except OSError as error:
        from moejax.files import FULL_DISK_ERRORS

        if error.errno not in FULL_DISK_ERRORS:
            raise
        raise UserError(
            f"no room to write in the run directory {config.directory} ({error.strerror}); checkpoints saved so far are unchanged; make "
            "room and give the same command again, or choose another --run-dir"
        ) from error


def evaluation_set(config: RunConfig, tokenizer, documents: list) -> "EvaluationSet":
    """A domain's held-out text, as batches that cover every byte once."""
    from moejax.data.evaluation_rows import evaluation_rows, iterate_rows
    from moejax.training.evaluation import EvaluationSet

    rows, utf8_bytes = evaluation_rows(tokenizer, documents, config.data.sequence_length, evaluation_bytes(config))
    return EvaluationSet(list(iterate_rows(rows, config.train.batch_size)), utf8_bytes)


def evaluation_bytes(config: RunConfig) -> int:
    """Held-out UTF-8 bytes evaluated per domain."""
    return int(config.train.eval_kilobytes * 1000)


def report(config: RunConfig, bits_per_byte: dict[str, float], held_out: dict) -> None:
    """Evaluation per domain beside what gzip -9 makes of the same text."""
    from moejax.data.evaluation_rows import gzip_bits_per_byte

    log("\nheld-out text, bits per byte:")
    for domain, value in bits_per_byte.items():
        log(f"  {domain:<8} {value:.3f}   (gzip -9 of the same text: {gzip_bits_per_byte(held_out[domain], evaluation_bytes(config)):.3f})")


def print_sample(config: RunConfig, model, params, tokenizer) -> None:
    """What the trained model makes of the config's prompt, and the command that makes more."""
    from moejax import generate

    sample = config.sample
    text = generate(model, {"params": params}, tokenizer, sample.prompt, **asdict(sample.settings))
    log(f"\na sample, temperature {sample.temperature}:\n{sample.prompt}{text}\n")
    log(f'more of it:\n  python sample.py --checkpoint {config.directory} --prompt "{sample.prompt}"')


def log(line: str) -> None:
    """A line to stdout, at once; of several processes, the first one speaks."""
    if is_first():
        print(line, flush=True)


if __name__ == "__main__":
    prepare_process()
    run_command(main)
