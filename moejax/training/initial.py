"""What a run begins with when it does not begin with nothing: weights and tokenizer of a checkpoint (`RunConfig.init_from`).

A run that has a checkpoint of its own goes on from that one, and `init_from` is not read again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from moejax.checkpoint import store
from moejax.checkpoint.detect import find_checkpoint
from moejax.checkpoint.hub import locate
from moejax.checkpoint.source import open_source
from moejax.config import ModelConfig, RunConfig, UserError
from moejax.data.text import Tokenizer, find_tokenizer, load_tokenizer

COEFFICIENTS = {"router_aux_loss_coefficient", "router_z_loss_coefficient"}
# How far the model reads: a run may train it to read further than its checkpoint does.
REACH = {"max_length", "rope_scaling"}
# Fields of the model that a run chooses for itself: how it is computed and trained, and that; not which function of short texts it is.
CHOSEN_BY_THE_RUN = (
    {"dispatch", "ragged_buffer_factor", "dtype", "param_dtype", "remat", "scan_layers", "initializer_range"} | COEFFICIENTS | REACH
)
# What lies beside published weights and is handed on with a run's checkpoints; the tokenizer itself is saved apart.
COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "chat_template.jinja", "generation_config.json"),
)


@dataclass(frozen=True)
class Start:
    """A checkpoint to begin with: its path as given, the directory of its weights, its model's configuration and its tokenizer."""

    path: str
    directory: Path
    model: ModelConfig
    tokenizer: Tokenizer


def complete_config(config: RunConfig, needs_weights: bool = True) -> RunConfig:
    """The configuration with the model of its checkpoint, where it names no sizes of its own.

    One that does is what it is where no weights are needed, as for a plan.

    The checkpoint is the run's newest, else that of `init_from`. Weights are kept in config.model.param_dtype (float32 unless set),
    and computed in the checkpoint's dtype; float16, in which small gradients vanish, becomes bfloat16. Rows become no longer than what
    the model is meant for. Raises UserError where `init_from` is empty, or holds no checkpoint.
    """
    metadata = store.latest_metadata(config.directory)
    if metadata is not None:
        config = replace(config, init_from=config.init_from or (metadata.run or {}).get("init_from"))
        model = metadata.config
    elif not config.init_from and not needs_weights and _names_sizes(config):
        return config
    elif not config.init_from:
        raise UserError("this config trains a model that exists already; name its checkpoint: --init-from DIRECTORY")
    else:
        found = read_model_config(config.init_from)[1]
        names = {"dispatch", "remat", "scan_layers", "param_dtype"} | _differing(
            config.model, ModelConfig(), COEFFICIENTS | {"ragged_buffer_factor"}
        )
        own = {name: getattr(config.model, name) for name in names}
        model = replace(found, **own, dtype="bfloat16" if found.dtype == "float16" else found.dtype)
    if _names_sizes(config):
        return config  # it names its own sizes; `find_start` compares them
    return replace(config, model=model, data=replace(config.data, sequence_length=min(config.data.sequence_length, model.max_length)))


def _names_sizes(config: RunConfig) -> bool:
    return bool(_differing_fields(config.model, ModelConfig(), CHOSEN_BY_THE_RUN - REACH))


def find_start(config: RunConfig) -> Start | None:
    """The checkpoint that a run begins with; None where it begins with nothing, or goes on from a checkpoint of its own.

    Raises UserError, before a weight is read, where `init_from` holds no checkpoint, where its model is another than that of the
    configuration, where it has no tokenizer (and `data.tokenizer` names none), and where tokenizer and model do not fit.
    """
    if not config.init_from or store.latest_step(Path(config.directory)) is not None:
        return None
    directory, model = read_model_config(config.init_from)
    differing = _differing_fields(config.model, model)
    if differing:
        shown = "; ".join(f"model.{name} is {getattr(config.model, name)!r} and there {getattr(model, name)!r}" for name in differing)
        raise UserError(
            f"init_from={config.init_from!r} holds another model than this run's: {shown}. Leave these fields out: a config without "
            "sizes of its own, as configs/finetune.py, takes them from the checkpoint"
        )
    return Start(config.init_from, directory, model, _choose_tokenizer(config, directory, model))


def read_model_config(path: str) -> tuple[Path, ModelConfig]:
    """The directory of a checkpoint's weights and its model's configuration. Raises UserError where there is none."""
    try:
        kind, directory = find_checkpoint(locate(path)[0])
        if kind == "moejax":
            return directory, store.read_metadata(directory).config
        with open_source(directory) as source:
            return directory, source.config
    except UserError as error:
        raise UserError(f"init_from={path!r}: {error}") from error


def _differing_fields(model: ModelConfig, other: ModelConfig, chosen: set[str] = CHOSEN_BY_THE_RUN) -> list[str]:
    """The fields but the `chosen` ones in which two models differ; none: they are the same function of their weights."""
    differing = _differing(model, other, {field.name for field in fields(ModelConfig)} - chosen)
    if model.head_width == other.head_width:
        differing -= {"head_size"}  # None says the same as the width that follows from the other sizes
    return [field.name for field in fields(ModelConfig) if field.name in differing]


def _differing(model: ModelConfig, other: ModelConfig, names: set[str]) -> set[str]:
    return {name for name in names if getattr(model, name) != getattr(other, name)}


def _choose_tokenizer(config: RunConfig, directory: Path, model: ModelConfig) -> Tokenizer:
    found = find_tokenizer(directory) or find_tokenizer(locate(str(config.init_from))[0])
    named = load_tokenizer(config.data.tokenizer) if config.data.tokenizer is not None else None
    if found is not None and named is not None and found.model_bytes != named.model_bytes:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r} is another than the one of init_from={config.init_from!r}, which its weights "
            "were trained with; leave --data.tokenizer out"
        )
    tokenizer = found or named
    if tokenizer is None:
        raise UserError(
            f"init_from={config.init_from!r} has no tokenizer beside its weights, and its model can read no other; put its "
            "tokenizer.model there, or name it with --data.tokenizer"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer of init_from={config.init_from!r} has {tokenizer.vocab_size} pieces but its model's vocabulary has "
            f"{model.vocab_size}: they do not belong together; put the model's own tokenizer.model there"
        )
    return tokenizer


def keep_companions(start: Start, run_directory: Path) -> None:
    """Copies chat template, generation defaults and the tokenizer's settings, where the checkpoint has them, into the run's directory."""
    for name in COMPANIONS:
        if (start.directory / name).is_file():
            shutil.copyfile(start.directory / name, run_directory / name)


def companion_writer(run_directory: Path, tokenizer: Tokenizer) -> Callable[[Path], None]:
    """A function that puts the tokenizer and what `keep_companions` kept into a checkpoint: with them it samples, chats and exports."""

    def write(checkpoint: Path) -> None:
        tokenizer.save(checkpoint)
        for name in COMPANIONS:
            if (run_directory / name).is_file():
                shutil.copyfile(run_directory / name, checkpoint / name)

    return write
