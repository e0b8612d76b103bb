"""The checkpoints of a run: when they are written, which are kept, and which one a run goes on from."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint import store
from moejax.checkpoint.manifest import DamagedCheckpoint
from moejax.checkpoint.processes import gather, wait_for_all
from moejax.cli import AtOnce
from moejax.config import RunConfig, UserError, to_json
from moejax.distributed import is_lost_process
from moejax.model.transformer import stack_layers, unstack_layers
from moejax.training.state import TrainState, rebuild, stored_part


class Saver:
    """Writes and reads the checkpoints of a run's directory, one at a time, behind the run's back.

    As a context, it ends when everything is on the disk. What goes wrong with a checkpoint is raised by the next call after it: `save`,
    `poll`, `wait`, or the end of the context.
    """

    def __init__(self, config: RunConfig, write_extra: Callable[[Path], None], log: Callable[[str], None] = print) -> None:
        """write_extra puts what sampling needs (the tokenizer) into a checkpoint; it is called in another thread."""
        self.config, self.write_extra, self.log = config, write_extra, log
        self.directory = Path(config.directory)
        self.origin = (0, 0)  # step and rows read of the checkpoint that the run went on from; from there on it reads batch_size a step
        self.pending: Future[None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        """Waits; not where an interruption is to act at once, nor for a process that is gone, with which no checkpoint becomes whole.

        What ended the run is raised before what ended the checkpoint.
        """
        if isinstance(error, AtOnce) or (error is not None and is_lost_process(error)):
            return
        try:
            self.wait()
        except UserError as failed:
            if error is None or isinstance(error, KeyboardInterrupt):
                raise
            self.log(f"the last checkpoint was not saved: {failed}")

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(self, state: TrainState) -> None:
        """Begins to write checkpoints/<step>; the state may be given away as soon as this returns. Waits for the one before, if need be.

        Raises UserError where there is no room for it, or was none for the one before.
        """
        self.wait()
        step = int(state.step)
        target = store.step_directory(self.directory, step)
        if target.exists():
            return
        finish = store.begin_save(
            target,
            state.params if self.config.model.scan_layers else stack_layers(state.params, self.config.model),
            self.config.model,
            optimizer=stored_part(state),
            step=step,
            rows_read=self.rows_read(step),
            random={"seed": self.config.train.seed, "step": step},  # what is random is a function of both
            run=to_json(self.config),
            write_extra=self.write_extra,
        )
        self.pending = Future()
        threading.Thread(target=self._finish, args=(finish, self.pending), name="checkpoint", daemon=True).start()

    def _finish(self, finish: Callable[[], None], done: Future[None]) -> None:
        try:
            finish()
            if jax.process_index() == 0:
                store.prune(self.directory, self.config.train.keep_checkpoints, self.config.train.keep_every)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def poll(self) -> None:
        """Raises what went wrong with the checkpoint last begun, if that is known by now; waits for nothing."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint last begun is on the disk. Raises what went wrong with it, once."""
        if self.pending is not None:
            self.pending.exception()  # an interruption while waiting leaves it pending
            done, self.pending = self.pending, None
            done.result()

    # -- reading ------------------------------------------------------------------------------------------------------

    def restore(self, target: TrainState) -> TrainState | None:
        """The state of the newest whole checkpoint, in the shapes, dtypes and shardings of `target`; None where there is none.

        Every file is compared with its checksum first. A damaged checkpoint is named in a line and moved aside, and the one before it
        taken. Raises UserError where none of several is whole, for a state of another model or optimiser, and for a batch size that
        does not divide the rows read so far.
        """
        damaged: list[tuple[Path, str]] = []
        for directory in reversed(store.list_steps(self.directory, also_incomplete=True)):
            problem = _find_damage(directory)
            if problem is not None:
                damaged.append((directory, problem))
                continue
            metadata = store.read_metadata(directory)
            step = metadata.step or 0
            self.origin = (step, _count_rows(metadata))
            self.first_batch(step)
            state = self._read(directory, step, target)
            self._set_aside(damaged, directory)
            self.log(f"resuming {self.directory} at step {step}")
            return state
        if damaged:
            raise UserError(
                f"none of the checkpoints of {self.directory} is whole: {self._list_damage(damaged)}; put a good copy of one in its place, "
                f"or remove {self.directory / store.STEPS} to start over"
            )
        if store.list_set_aside(self.directory):
            raise UserError(
                f"{self.directory / store.STEPS} holds damaged checkpoints only; put a good one there, or remove the folder to start over"
            )
        return None

    def rows_read(self, step: int) -> int:
        """Rows that the run has read after `step` steps: the whole state of its data."""
        return self.origin[1] + (step - self.origin[0]) * self.config.train.batch_size

    def first_batch(self, step: int) -> int:
        """The number of the batch, all of them of today's batch size, that follows `step`. Raises UserError where one would be cut."""
        rows, train = self.rows_read(step), self.config.train
        if rows % train.batch_size:
            near = sorted(range(1, 8 * train.batch_size + 1), key=lambda size: abs(size - train.batch_size))
            fitting = [size for size in near if rows % size == 0 and size % train.accumulation_steps == 0][:5]
            raise UserError(
                f"train.batch_size={train.batch_size} does not divide the {rows} rows that {self.directory} has read; go on with "
                f"{', '.join(map(str, sorted(fitting))) or 'fewer train.accumulation_steps'}"
            )
        return rows // train.batch_size

    def _read(self, directory: Path, step: int, target: TrainState) -> TrainState:
        """The state in a checkpoint that is known to be whole."""
        model = self.config.model
        stacked = target.params if model.scan_layers else None
        params = store.restore_params(directory, model, sharding=stacked and _list_shardings(stacked), verify=False)
        if stacked is None:
            params = jax.tree.map(_place, unstack_layers(params, model), _list_shardings(target.params))
        state = rebuild(step, params, store.restore_optimizer(directory, stored_part(target), verify=False))
        placed = getattr(target.step, "sharding", None)  # as every step leaves it: another place would be another program to compile
        return state if placed is None else dataclasses.replace(state, step=jax.device_put(state.step, placed))

    def _set_aside(self, damaged: list[tuple[Path, str]], instead: Path) -> None:
        if not damaged:
            return
        wait_for_all("restored")  # what one process moves, no other reads any more
        try:
            if jax.process_index() == 0:
                store.set_aside([directory for directory, _ in damaged])
        except OSError as error:
            raise UserError(f"cannot move a damaged checkpoint aside: {error}; remove {damaged[0][0]} yourself") from error
        moved = ", ".join(f"{store.STEPS}/{store.SET_ASIDE}{directory.name}" for directory, _ in damaged)
        self.log(f"{self._list_damage(damaged)}; going on from {store.STEPS}/{instead.name} (what is damaged is now {moved})")

    def _list_damage(self, damaged: list[tuple[Path, str]]) -> str:
        return "; ".join(f"{store.STEPS}/{directory.name} is damaged ({problem})" for directory, problem in damaged)


def steps_to_take(config: RunConfig) -> int:
    """Steps of the whole run as `RunConfig.steps`, but where its length is given in tokens and its batch size has changed on the way."""
    newest = store.latest_metadata(config.directory)
    tokens = [stage.tokens for stage in config.data.curriculum]
    if newest is None or config.train.steps is not None or None in tokens:
        return config.steps
    rows = -(-sum(count for count in tokens if count is not None) // config.data.sequence_length)
    left = max(rows - _count_rows(newest), 0)
    return (newest.step or 0) + -(-left // config.train.batch_size)


def _find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in any process's share of its files; None where nothing is."""
    problem = ""
    try:
        store.verify(directory)
    except DamagedCheckpoint as error:
        problem = error.describe(directory.absolute())
    return next(filter(None, gather(problem)), None)


def _count_rows(metadata: store.Metadata) -> int:
    """Rows read at a checkpoint; those of moejax that did not say it read one batch size throughout."""
    if metadata.rows_read is not None:
        return metadata.rows_read
    return (metadata.step or 0) * ((metadata.run or {}).get("train") or {}).get("batch_size", 0)


def _list_shardings(tree: Any) -> Any:
    """The sharding of each leaf; the first local device where a leaf has none."""
    return jax.tree.map(lambda leaf: getattr(leaf, "sharding", None) or store.first_device(), tree)


def _place(leaf: jax.Array, sharding: Any) -> jax.Array:
    """The leaf, whole in every process, laid out as `sharding` says; of several processes each takes the parts on its own devices."""
    if getattr(sharding, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
