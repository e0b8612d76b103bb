"""What several processes do together when they write or judge one checkpoint. One process alone does it without asking anybody."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from moejax.checkpoint.atomic import write_directory
from moejax.config import UserError

WAIT_SECONDS = 1200  # for the slowest process, as Orbax waits
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


def wait_for_all(what: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        _wait_for_all(f"moejax-{what}-{next(_barriers)}")


def _wait_for_all(name: str) -> None:
    """Asks the processes' coordinator and no device, whose queue is the main thread's."""
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=name, timeout_ms=WAIT_SECONDS * 1000)
