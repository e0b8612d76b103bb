"""Saving a run's state: how long a step waits for it, against writing it at once, in the same run.

The default is the state of the small Mixtral of the `train` benchmark with AdamW: 39 M parameters and two moments, 470 MB.
"""

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np

from moejax.bench.measure import describe_timing, summarise_seconds
from moejax.bench.output import Output, report
from moejax.bench.shape import PEER_SHAPE
from moejax.config import ModelConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class Arguments(Output):
    """Times saves of a run's state, into a directory that is removed afterwards."""

    model: ModelConfig = field(default_factory=lambda: replace(PEER_SHAPE, scan_layers=True))  # stacked, as it lies on disk
    repeats: int = 5
    directory: str | None = None  # where the checkpoints are written; None: where temporary files go


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    from moejax.checkpoint import store
    from moejax.model.transformer import Transformer
    from moejax.training.saving import Saver
    from moejax.training.state import create_optimizer, create_state

    state = create_state(Transformer(arguments.model), create_optimizer(TrainConfig()), seed=0)
    jax.block_until_ready(state)
    blocking, whole, at_once = [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        config = RunConfig(run_dir=folder, model=arguments.model, train=TrainConfig(keep_checkpoints=1))
        saver = Saver(config, lambda folder: None)
        for step in range(arguments.repeats + 1):
            started = time.perf_counter()
            saver.save(replace(state, step=jax.numpy.int32(step)))
            blocking.append(time.perf_counter() - started)
            saver.wait()
            whole.append(time.perf_counter() - started)
            started = time.perf_counter()
            store.save(Path(folder) / "at_once", state.params, arguments.model, optimizer=state.optimizer_state, overwrite=True)
            at_once.append(time.perf_counter() - started)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    result = {
        "bytes_per_second": size / float(np.median(whole[1:])),
        **describe_timing(summarise_seconds(whole[1:])),
        "state_bytes": size,
        "save_returns_seconds": float(np.median(blocking[1:])),  # the first one imports Orbax
        "save_returns_seconds_highest": max(blocking[1:]),
        "save_complete_seconds": float(np.median(whole[1:])),
        "save_at_once_seconds": float(np.median(at_once[1:])),
    }
    report("save", result, arguments)
