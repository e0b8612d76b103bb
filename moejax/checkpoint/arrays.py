"""Saves and restores trees of arrays with Orbax; the only file that knows Orbax.

Orbax is imported inside the functions: `import moejax` does not pay for it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from moejax.config import UserError
from moejax.families.layout import flatten_leaves


def save_arrays(path: Path, tree: dict[str, Any]) -> None:
    """Writes nested dicts of numpy or jax arrays to the new directory `path`; returns when they are on the disk."""
    import orbax.checkpoint as ocp

    with _quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(tree))  # pyright: ignore[reportCallIssue]


def restore_arrays(path: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """The arrays saved in `path`, as jax arrays of the dtypes and shardings of `targets` (nested dicts of jax.ShapeDtypeStruct).

    Raises UserError, naming `path`, where they are damaged.
    """
    import orbax.checkpoint as ocp

    try:
        with _quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.StandardRestore(targets))  # pyright: ignore[reportCallIssue]
    except Exception as error:
        raise _damaged(path, error) from error


def describe_arrays(path: Path) -> dict[tuple[str, ...], Any]:
    """Tree path -> metadata (shape, dtype) of the arrays saved in `path`; reads none. Raises UserError where there are none."""
    import orbax.checkpoint as ocp

    if not path.is_dir():
        raise UserError(f"{path.parent} has no {path.name}/ with the saved arrays; the checkpoint is incomplete, use another one")
    try:
        with _quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            description = checkpointer.metadata(path).item_metadata
            if description is None:  # Orbax has logged the reason and goes on
                raise ValueError("Orbax finds no description of them that it can read")
        return flatten_leaves(description.tree)
    except Exception as error:
        raise _damaged(path, error) from error


def first_device() -> jax.sharding.Sharding:
    """The sharding of an array that lies on the first local device: where arrays go when nothing else is said."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return UserError(f"{path} is damaged: its arrays cannot be read ({reason}); use another checkpoint")


class _LateErrors(logging.Filter):
    """Drops what asyncio says of the other writes of a save that has failed: it does so when they are collected, at any later time."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not ("never retrieved" in message and "orbax" in message)


_late_errors = _LateErrors()


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps a failing Orbax from printing tracebacks of its threads: the error reaches the caller as an exception anyway."""

    def drop_closed_loop(unraisable: Any) -> None:
        # Reads and writes that end after the first one failed report to an event loop that is closed by then.
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    logger, previous = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = drop_closed_loop
    try:
        yield
    except BaseException:
        logging.getLogger("asyncio").addFilter(_late_errors)
        time.sleep(0.5)  # for the late ones
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = previous
