"""Ctrl-C and SIGTERM as a flag that the loop looks at between two steps, in all processes of a job alike."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


class Agreement:
    """Whether any process was interrupted: all of them get the same answer at the same step, and so save the same one.

    A signal reaches processes in different steps. The flags of one step are reduced on the devices, behind that step, and looked at
    after the next one, when they are known: nothing waits. A process alone looks at its own flag.
    """

    def __init__(self, own: Callable[[], bool]) -> None:
        self.own = own
        self.latest: jax.Array | None = None

    def __call__(self) -> bool:
        """Called by all processes after every step; what was raised before the step is known now."""
        if jax.process_count() == 1:
            return self.own()
        before, self.latest = self.latest, _reduce_flags(self.own())
        return before is not None and bool(before)

    def settle(self) -> bool:
        """Whether any was interrupted until now; waits for all processes."""
        return self() or (self.latest is not None and bool(self.latest))


def _reduce_flags(own: bool) -> jax.Array:
    """int32 scalar: the largest of all processes' flags. Does not wait."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices), ("all",))
    flags = np.full(jax.local_device_count(), own, np.int32)
    divided = NamedSharding(mesh, PartitionSpec("all"))
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(jax.make_array_from_process_local_data(divided, flags))
