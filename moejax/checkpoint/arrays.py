"""Saves and restores trees of arrays with Orbax; the only file that knows Orbax.

Orbax is imported inside the functions: `import moejax` does not pay for it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoint.manifest import DamagedCheckpoint
from moejax.families.layout import flatten_leaves


def save_arrays(path: Path, tree: dict[str, Any]) -> None:
    """Writes nested dicts of numpy or jax arrays to the new directory `path`; returns when they are on the disk."""
    begin_arrays({path: tree})()


def begin_arrays(trees: Mapping[Path, dict[str, Any]]) -> Callable[[], None]:
    """Begins to write trees of arrays to new directories, and returns a function that waits until they are on the disk.

    jax arrays may be donated as soon as this returns; numpy arrays must be left as they are. Orbax copies what lies on an accelerator
    to the host first. Where device and host are one, it holds a view of each buffer, and jax gives a donated buffer that a view is
    held of to nobody: the step that donates it writes its results elsewhere. Every process calls this, and writes its own shards.
    """
    import orbax.checkpoint as ocp

    writers = []

    def wait() -> None:
        """Waits for all of them, so that none still writes when the first error is raised."""
        errors = []
        for writer in writers:
            try:
                writer.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def finish() -> None:
        with _quiet:
            wait()

    with _quiet:
        try:
            for path, tree in trees.items():
                writers.append(ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()))
                writers[-1].save(path, args=ocp.args.StandardSave(tree))
        except BaseException:
            with contextlib.suppress(Exception):
                wait()
            raise
    return finish


def restore_arrays(path: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """The arrays saved in `path`, as jax arrays of the dtypes and shardings of `targets` (nested dicts of jax.ShapeDtypeStruct).

    Raises DamagedCheckpoint, naming `path`, where they cannot be read.
    """
    import orbax.checkpoint as ocp

    try:
        with _quiet, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.StandardRestore(targets))  # pyright: ignore[reportCallIssue]
    except Exception as error:
        raise _damaged(path, error) from error


def describe_arrays(path: Path) -> dict[tuple[str, ...], Any]:
    """Tree path -> metadata (shape, dtype) of the arrays saved in `path`; reads none. Raises DamagedCheckpoint where there are none."""
    import orbax.checkpoint as ocp

    if not path.is_dir():
        raise DamagedCheckpoint(path.parent, f"has no {path.name}/ with the saved arrays")
    try:
        with _quiet, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            description = checkpointer.metadata(path).item_metadata
            if description is None:  # Orbax has logged the reason and goes on
                raise ValueError("Orbax finds no description of them that it can read")
        return flatten_leaves(description.tree)
    except Exception as error:
        raise _damaged(path, error) from error


def first_device() -> jax.sharding.Sharding:
    """The sharding of an array that lies on the first local device: where arrays go when nothing else is said."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _damaged(path: Path, error: Exception) -> DamagedCheckpoint:
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return DamagedCheckpoint(path, f"is damaged: its arrays cannot be read ({reason})")


class _LateErrors(logging.Filter):
    """Drops what asyncio says of the other writes of a save that has failed: it does so when they are collected, at any later time."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not ("never retrieved" in message and "orbax" in message)


_late_errors = _LateErrors()


class _Quiet:
    """Keeps a failing Orbax from printing tracebacks of its threads: the error reaches the caller as an exception anyway.

    As a context, which may be entered in several threads at once: a run may read one checkpoint while it writes another.
    """

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            self.depth += 1
            if self.depth > 1:
                return
            logger = logging.getLogger("absl")
            self.level, self.hook = logger.level, sys.unraisablehook
            logger.setLevel(logging.CRITICAL)
            sys.unraisablehook = self.drop_closed_loop

    def __exit__(self, kind: Any, *error: object) -> None:
        if kind is not None:
            logging.getLogger("asyncio").addFilter(_late_errors)
            time.sleep(0.5)  # for the late ones
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                logging.getLogger("absl").setLevel(self.level)
                sys.unraisablehook = self.hook

    def drop_closed_loop(self, unraisable: Any) -> None:
        """Reads and writes that end after the first one failed report to an event loop that is closed by then."""
        if "Event loop is closed" not in str(unraisable.exc_value):
            self.hook(unraisable)


_quiet = _Quiet()
