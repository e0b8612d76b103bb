"""One training step: tokens/s, and FLOP/s against a large matmul of the same turns.

The default shape is a small Mixtral (39 M parameters, dropless); batch 8 x 256 tokens, float32, AdamW, clipped gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from moejax.bench.measure import (
    Ceilings,
    compile_program,
    describe_rates,
    describe_shape,
    peak_memory,
    temporary_bytes,
    time_calls,
)
from moejax.bench.output import Output, report
from moejax.bench.shape import PEER_BATCH, PEER_SHAPE, SHAPE_FIELDS, hold_to_peer_shape
from moejax.config import ModelConfig, TrainConfig


@dataclass(frozen=True)
class Arguments(Output):
    """Times training steps."""

    model: ModelConfig = field(default_factory=lambda: PEER_SHAPE)
    batch_size: int = PEER_BATCH[0]
    sequence_length: int = PEER_BATCH[1]
    repeats: int = 10
    peer_shape: bool = False  # the default shape, said aloud: no size may be another


@dataclass(frozen=True)
class CompiledStep:
    """A training step that can be taken again and again, each on the state that the one before left."""

    run: Callable[[], Any]  # one step; its loss
    parameters: int
    compile_seconds: float
    temporary_bytes: int | None


def compile_step(config: ModelConfig, rows: int, length: int) -> CompiledStep:
    """A step of AdamW with clipping on [rows, length] random tokens, compiled; its state is initialised."""
    from moejax.data.rows import Batch
    from moejax.model.transformer import Transformer
    from moejax.training.state import create_optimizer, create_state
    from moejax.training.step import train_step

    shape = (rows, length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.float32), np.ones(shape, np.int32), positions)
    model, optimizer = Transformer(config), create_optimizer(TrainConfig(learning_rate=3e-5, warmup_steps=0))
    state = create_state(model, optimizer, seed=0)
    jax.block_until_ready(state)
    step, compile_seconds = compile_program(train_step, model, optimizer, state, batch)
    carried = [state]

    def run() -> Any:
        carried[0], metrics = step(carried[0], batch)
        return metrics["loss"]

    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    del state  # the step's first donation then frees it
    return CompiledStep(run, parameters, compile_seconds, temporary_bytes(step))


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    from moejax.families.flops import count_flops

    arguments = hold_to_peer_shape(arguments, batch_size=PEER_BATCH[0], sequence_length=PEER_BATCH[1])
    config, rows, length = arguments.model, arguments.batch_size, arguments.sequence_length
    step = compile_step(config, rows, length)
    for _ in range(2):
        jax.block_until_ready(step.run())
    memory = peak_memory()  # before the ceilings take theirs
    ceilings = Ceilings(config.dtype)
    timings = time_calls({"step": step.run, **ceilings.functions}, arguments.repeats)
    flops = count_flops(config, rows, length)
    result = {
        **describe_rates(timings["step"], ceilings.results(timings), rows * length, flops),
        "compile_seconds": step.compile_seconds,
        "temporary_bytes": step.temporary_bytes,
        **memory,
        "flops_per_step": flops,
        "parameters": step.parameters,
        "batch_size": rows,
        "sequence_length": length,
        **describe_shape(config, SHAPE_FIELDS),
    }
    report("train", result, arguments)
