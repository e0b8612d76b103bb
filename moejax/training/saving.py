"""The checkpoints of a run: when they are written, which are kept, and which one a run goes on from."""

from collections.abc import Callable
from pathlib import Path

import jax
from jax import numpy as jnp

from moejax.checkpoint import store
from moejax.config import RunConfig, to_json
from moejax.model.transformer import stack_layers, unstack_layers
from moejax.training.state import TrainState, rebuild, stored_part


class Saver:
    """Writes and reads the checkpoints of a run's directory. As a context, it ends when everything is on the disk."""

    def __init__(self, config: RunConfig, write_extra: Callable[[Path], None], log: Callable[[str], None] = print) -> None:
        """write_extra puts what sampling needs (the tokenizer) into a checkpoint."""
        self.config, self.write_extra, self.log = config, write_extra, log
        self.directory = Path(config.directory)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def restore(self, target: TrainState) -> TrainState | None:
        """The state of the newest whole checkpoint, in the shapes, dtypes and shardings of `target`; None where there is none."""
        newest = store.latest_step(self.directory)
        if newest is None:
            return None
        step = store.read_metadata(newest).step
        params = store.restore_params(newest, self.config.model)
        if not self.config.model.scan_layers:
            params = unstack_layers(params, self.config.model)
        stored = store.restore_optimizer(newest, stored_part(target))
        self.log(f"resuming {self.directory} at step {step}")
        return rebuild(step or 0, jax.tree.map(jnp.asarray, params), stored)

    def save(self, state: TrainState) -> None:
        """Begins to write checkpoints/<step>; the state may be given away as soon as this returns."""
        step = int(state.step)
        target = store.step_directory(self.directory, step)
        if target.exists():
            return
        store.save(
            target,
            state.params if self.config.model.scan_layers else stack_layers(state.params, self.config.model),
            self.config.model,
            optimizer=stored_part(state),
            step=step,
            run=to_json(self.config),
            write_extra=self.write_extra,
        )
        store.prune(self.directory, self.config.train.keep_checkpoints)

    def wait(self) -> None:
        """Returns when the checkpoint last begun is on the disk. Raises what went wrong with it."""
