"""Ctrl-C and SIGTERM as a flag that the loop looks at between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moejax.cli import AtOnce


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C and SIGTERM only raise a flag, which the yielded function reads; a second one raises AtOnce, which waits for no
    checkpoint that is being written (one that is not complete is never seen).

    Only a process's main thread may handle signals: in another one, as in some notebooks, they stay with whoever handles them.
    """
    seen: list[int] = []
    previous = {}
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise AtOnce

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python
