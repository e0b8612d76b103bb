"""A clock that moves when it is told to; and a run's directory as a long run leaves it, made up: what the report is tried on."""

import json
import math
import random
from pathlib import Path

import pytest

from moejax.config import DataConfig, ModelConfig, RunConfig, Stage, TrainConfig, to_json

TOKENS_PER_STEP = 1_000_000


class FakeClock:
    """Says `now` whenever it is called."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    """A clock at 50 s."""
    return FakeClock()


def make_row(step: int, layers: int, rng: random.Random) -> dict:
    """A row of metrics.jsonl, in the order that a run writes it."""
    return {
        "step": step, "tokens": step * TOKENS_PER_STEP, "loss": 2 + 6 * math.exp(-step / 300) + rng.gauss(0, 0.05), "router_aux_loss": 8.1,
        "grad_norm": math.exp(rng.gauss(0, 0.4)), "dropped_tokens": 0.0, "skipped_steps": int(step > 400) * 3,
        "expert_load_entropy": 0.95, "expert_load_max_over_mean": [1.2 + 0.02 * layer + rng.random() * 0.3 for layer in range(layers)],
        "expert_load_entropy_per_layer": [0.97 - 0.003 * layer - rng.random() * 0.02 for layer in range(layers)],
        "learning_rate": 3e-4 * min(step / 100, 1.0), "tokens_per_second": 4.1e6 + rng.gauss(0, 5e4), "seconds_per_step": 0.25,
        "data_wait_fraction": 0.01, "save_fraction": 0.1 * (step % 100 == 0), "evaluation_fraction": 0.2 * (step % 200 == 0),
        "compile_fraction": 0.9 * (step == 1), "mfu": 0.41, "goodput": 0.8, "peak_memory_bytes": 61_000_000_000,
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run's directory: make_run("name", rows=100, layers=4) -> Path."""

    def make(name: str = "long", rows: int = 120, layers: int = 35) -> Path:
        directory, rng = tmp_path / name, random.Random(0)
        (directory / "checkpoints" / "00000900").mkdir(parents=True)
        (directory / "checkpoints" / "00000900" / "moejax.json").write_text("{}")
        stages = (Stage(400_000_000, {"prose": 3, "code": 1}), Stage(None, {"prose": 1, "code": 1}))
        config = RunConfig(name=name, model=ModelConfig(num_layers=layers), data=DataConfig(stages=stages), train=TrainConfig(steps=2000))
        (directory / "config.json").write_text(json.dumps(to_json(config)))
        lines = [make_row(step, layers, rng) for step in (1, *range(10, 10 * rows, 10))]
        evaluated = [{"step": s, "tokens": s * TOKENS_PER_STEP, "domain": d, "eval_bits_per_byte": 2 - s / 2000, "eval_loss": 3.0,
                      "eval_bytes": 200_000} for s in range(200, 10 * rows, 200) for d in ("prose", "code")]  # fmt: skip
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *evaluated]))
        parts = {"seconds": 300.0, "step_seconds": 220.0, "data_seconds": 5.0, "compile_seconds": 40.0, "startup_seconds": 35.0}
        machine = {"device": "TPU v5", "devices": 64, "host": "t1v", "dtype": "bfloat16", "peak_source": "listed",
                   "peak_flops_per_second": 64 * 459e12, "command": "python train.py configs/long.py --train.steps 2000"}  # fmt: skip
        starts = [
            {"start": 1, "began": 1.7e9, "first_step": 1, "last_step": 640, "ended": None, "updated": 1.7e9 + 300, **parts, **machine},
            {
                "start": 2,
                "began": 1.7e9 + 400,
                "first_step": 601,
                "last_step": 1190,
                "ended": None,
                "updated": 1.7e9 + 700,
                **parts,
                **machine,
            },
        ]
        (directory / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
        return directory

    return make
