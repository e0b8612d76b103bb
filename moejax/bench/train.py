"""One training step: tokens/s, and FLOP/s against a large matmul of the same run.

The default shape is a small Mixtral (39 M parameters, dropless); batch 8 x 256 tokens, float32, AdamW, clipped gradients.
"""

import time
from dataclasses import dataclass, field

import jax
import numpy as np

from moejax.bench.measure import matmul_ceiling, report, time_calls
from moejax.config import ModelConfig, TrainConfig

PEER_SHAPE = ModelConfig(
    family="mixtral", vocab_size=32000, hidden_size=256, intermediate_size=896, num_layers=4, num_heads=8, num_kv_heads=2,
    head_size=32, num_experts=8, experts_per_token=2, rope_theta=1e6, residual_mlp=False, top_1_weight="one",
    router_aux_loss_kind="pooled", router_aux_loss_coefficient=0.0, scan_layers=False,
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Times training steps."""

    model: ModelConfig = field(default_factory=lambda: PEER_SHAPE)
    batch_size: int = 8
    sequence_length: int = 256
    repeats: int = 10
    json: str | None = None  # a file for the result; - prints only the JSON


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    from moejax.data.rows import Batch
    from moejax.families.flops import count_flops
    from moejax.model.transformer import Transformer
    from moejax.training.state import create_optimizer, create_state
    from moejax.training.step import train_step

    config, shape = arguments.model, (arguments.batch_size, arguments.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.float32), np.ones(shape, np.int32), positions)
    model, optimizer = Transformer(config), create_optimizer(TrainConfig(learning_rate=3e-5, warmup_steps=0))
    state = create_state(model, optimizer, seed=0)
    started = time.perf_counter()
    step = train_step.lower(model, optimizer, state, batch).compile()
    compile_seconds = time.perf_counter() - started
    carried = [state]

    def one_step() -> None:
        carried[0], metrics = step(carried[0], batch)
        jax.block_until_ready(metrics["loss"])

    timings = time_calls({"step": one_step, "ceiling": matmul_ceiling()}, arguments.repeats)
    flops = count_flops(config, *shape)
    rate, ceiling = flops / timings["step"].median, 2 * 2048**3 / timings["ceiling"].median
    result = {
        "tokens_per_second": shape[0] * shape[1] / timings["step"].median,
        "step_seconds": timings["step"].median,
        "step_seconds_lowest": timings["step"].lowest,
        "step_seconds_highest": timings["step"].highest,
        "flops_per_step": flops,
        "flops_per_second": rate,
        "ceiling_flops_per_second": ceiling,
        "fraction_of_ceiling": rate / ceiling,
        "compile_seconds": compile_seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(carried[0].params)),
        "batch_size": shape[0],
        "sequence_length": shape[1],
    }
    report("train", result, arguments.json)
