"""Where a run's time goes: data, saving, evaluation, compiling; what is left is the steps themselves."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax

# jax reports how long it traced, lowered and compiled under names that begin so.
COMPILE_EVENTS = "/jax/core/compile/"


class CompileTimer:
    """Seconds that this process's main work has spent compiling: tracing, lowering and XLA, as jax itself reports them."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = 0.0
        self.spans: list[tuple[float, float]] = []  # that `seconds` is the sum of: apart from each other, in order
        self.thread = threading.get_ident()

    def listen(self) -> None:
        """From now on, compiling counts; until `stop`."""
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def stop(self) -> None:
        """Counts no more."""
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """An event ends now. Jitted functions within others report their tracing too: each moment counts once."""
        if not event.startswith(COMPILE_EVENTS) or threading.get_ident() != self.thread:
            return
        end = self.clock()
        start = end - duration_secs
        while self.spans and self.spans[-1][0] >= start:
            inner = self.spans.pop()
            self.seconds -= inner[1] - inner[0]
        if self.spans and self.spans[-1][1] > start:
            start = self.spans[-1][1]
        self.spans.append((start, end))
        self.seconds += end - start


@dataclass
class Spent:
    """Seconds in all, and those of each part; what no part has taken went into steps."""

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> float:
        """Seconds left for the steps themselves."""
        return max(self.seconds - sum(self.parts.values()), 0.0)

    def share(self, part: str) -> float:
        """Part's share of all, 0 to 1."""
        return self.parts.get(part, 0.0) / self.seconds if self.seconds > 0 else 0.0

    def add(self, other: "Spent") -> None:
        """Takes the other's time in."""
        self.seconds += other.seconds
        for part, seconds in other.parts.items():
            self.parts[part] = self.parts.get(part, 0.0) + seconds


class StepClock:
    """Splits time into parts. `compiled` is the number of seconds spent compiling so far, wherever that was."""

    def __init__(self, clock: Callable[[], float], compiled: Callable[[], float]) -> None:
        self.clock, self.compiled = clock, compiled
        self.since, self.parts = clock(), {}
        self.compiled_before = compiled()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens within is of this part, compiling included; parts do not lie within each other."""
        started, compiled = self.clock(), self.compiled()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + self.clock() - started
            self.compiled_before += self.compiled() - compiled

    def take(self) -> Spent:
        """What was spent since the last call; compiling outside of the parts is the part `compile`."""
        now, compiled = self.clock(), self.compiled()
        parts = {**self.parts, "compile": max(compiled - self.compiled_before, 0.0)}
        spent = Spent(now - self.since, parts)
        self.since, self.parts, self.compiled_before = now, {}, compiled
        return spent
