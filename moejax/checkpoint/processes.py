"""What several processes do together when they write or judge one checkpoint. One process alone does it without asking anybody."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.atomic import write_directory
from moejax.config import UserError

WAIT_SECONDS = 1200  # for the slowest process, as Orbax waits
A_WEEK = 7 * 24 * 3600
_LONGEST_TEXT = 4096
_barriers = itertools.count()


@contextlib.contextmanager
def write_together(directory: Path, needed: int) -> Iterator[Path]:
    """`write_directory` of the first process, which the others write into as well; all leave it when it is in place.

    May be left in another thread than it was entered in. Raises UserError as `write_directory`, in every process.
    """
    if jax.process_count() == 1:
        with write_directory(directory, needed) as temporary:
            yield temporary
        return
    barrier = f"moejax-checkpoint-{next(_barriers)}"  # all processes write the same checkpoints, in the same order
    with contextlib.ExitStack() as opened:
        if jax.process_index() == 0:
            try:
                temporary = opened.enter_context(write_directory(directory, needed))
            except UserError:
                gather("")
                raise
            gather(str(temporary))
        else:
            told = gather("")[0]
            if not told:
                raise UserError(f"the first process could not begin to save {directory}; its message says why")
            temporary = Path(told)
        yield temporary
    _wait_for_all(barrier)


def gather(text: str) -> list[str]:
    """What each process says, cut to 4096 bytes; called by all of them, in their main thread."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    letters = np.zeros(_LONGEST_TEXT, np.uint8)
    encoded = np.frombuffer(text.encode()[:_LONGEST_TEXT], np.uint8)
    letters[: len(encoded)] = encoded
    said = np.asarray(multihost_utils.process_allgather(letters))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in said]


def wait_for_all(what: str, seconds: int = WAIT_SECONDS) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        _wait_for_all(f"moejax-{what}-{next(_barriers)}", seconds)


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """The first process is within alone; the others follow together, however long it took, and find what it has left."""
    if not jax.distributed.is_initialized():  # alone: mistakes in the text are told before any device is touched
        yield
        return
    if jax.process_index() != 0:
        wait_for_all(what, A_WEEK)
    yield
    if jax.process_index() == 0:
        wait_for_all(what, A_WEEK)


def require_alike(what: str, values: Any) -> None:
    """Raises UserError, in every process, unless `values` (JSON) are the same in all of them."""
    if not jax.distributed.is_initialized():
        return
    said = gather(hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest())
    others = [str(process) for process, text in enumerate(said) if text != said[0]]
    if others:
        raise UserError(f"{what} in process {', '.join(others)} of {len(said)} other than in process 0")


def _wait_for_all(name: str, seconds: int = WAIT_SECONDS) -> None:
    """Asks the processes' coordinator and no device, whose queue is the main thread's."""
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=name, timeout_ms=seconds * 1000)
