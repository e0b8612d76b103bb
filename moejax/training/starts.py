"""starts.jsonl: every time a run was started, with what became of it and where its time went; and the goodput of all.

Lines of one `start` add up: the first says what it is, later ones, one at every row of metrics.jsonl, how far it has come. They are
appended, so that a kill loses one interval at most; the next start writes one line for each before it.
"""

import contextlib
import json
import platform
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from moejax.files import write_file
from moejax.training.clock import Spent

PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


class StartsLog:
    """The starts of one run; the last of them is this process's, from `begin` on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.earlier: list[dict[str, Any]] = []
        self.start: dict[str, Any] = {}
        self.untold: dict[str, Any] = {}  # of `start`, what is not in the file yet
        self.spent = Spent()

    def begin(self, first_step: int, startup_seconds: float, facts: Mapping[str, Any]) -> None:
        """Adds this start, which began `startup_seconds` ago and takes `first_step` as its first."""
        self.earlier = read_starts(self.path)
        self.spent = Spent(startup_seconds, {"startup": startup_seconds})
        number, began = len(self.earlier) + 1, time.time() - startup_seconds
        self.start = {"start": number, "began": began, "first_step": first_step, "last_step": first_step - 1, "ended": None, **facts}
        self.start |= self._sum_up()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, "".join(json.dumps(start) + "\n" for start in [*self.earlier, self.start]))

    def tell(self, **facts: Any) -> None:
        """Adds to what is known of this start, once it has begun; in the file from the next `progress` on."""
        self.start |= facts
        self.untold |= facts

    def progress(self, last_step: int, spent: Spent) -> None:
        """Takes note of the step reached and of what was spent since the call before."""
        if self.start:
            self.spent.add(spent)
            self.tell(last_step=last_step)
            self._append()

    def end(self, how: str) -> None:
        """Says how the start ended: done, interrupted, or what went wrong. Without it, it is running or was killed."""
        if self.start:
            self.tell(ended=how)
            self._append()

    @property
    def goodput(self) -> float:
        """Of all starts so far; 0 to 1."""
        return measure_goodput([*self.earlier, self.start] if self.start else self.earlier)

    def _sum_up(self) -> dict[str, float]:
        parts = {f"{part}_seconds": round(seconds, 4) for part, seconds in self.spent.parts.items()}
        seconds = {"seconds": round(self.spent.seconds, 4), "step_seconds": round(self.spent.steps, 4)}
        return {"updated": time.time(), **seconds, **parts}

    def _append(self) -> None:
        self.tell(**self._sum_up())
        with self.path.open("a") as file:
            file.write(json.dumps({"start": self.start["start"], **self.untold}) + "\n")
        self.untold = {}


def read_starts(path: Path) -> list[dict[str, Any]]:
    """All starts, the first one first; none where there is no file. A line cut short by a kill is left out."""
    starts: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict) and isinstance(said.get("start"), int):
                starts.setdefault(said["start"], {}).update(said)
    return [start for _, start in sorted(starts.items()) if isinstance(start.get("first_step"), int)]


def count_kept_steps(starts: Sequence[Mapping[str, Any]]) -> list[int]:
    """Of each start, how many of its steps still count: those that no later start began at or before, and so did again."""
    kept, redone_from = [], None
    for start in reversed(starts):
        first = start["first_step"]
        last = start.get("last_step", first - 1)
        kept.append(max((last if redone_from is None else min(last, redone_from - 1)) - first + 1, 0))
        redone_from = first if redone_from is None else min(first, redone_from)
    return kept[::-1]


def split_steps(start: Mapping[str, Any], kept: int) -> tuple[float, float]:
    """Seconds of a start's steps that count, and of those done again; all of its steps are taken to be equally long."""
    steps = start.get("last_step", 0) - start["first_step"] + 1
    seconds = start.get("step_seconds", 0.0)
    counting = seconds * kept / steps if steps > 0 else 0.0
    return counting, seconds - counting


def measure_goodput(starts: Sequence[Mapping[str, Any]]) -> float:
    """Share of the seconds of all starts that went into steps which still count; 0 to 1, 0 before anything was spent.

    Starting up, compiling, waiting for data, saving and evaluating are no steps; time between starts belongs to none.
    """
    counting = sum(split_steps(start, kept)[0] for start, kept in zip(starts, count_kept_steps(starts), strict=True))
    seconds = sum(start.get("seconds", 0.0) for start in starts)
    return counting / seconds if seconds > 0 else 0.0


def describe_start() -> dict[str, Any]:
    """The command of this process, its host and the versions it runs on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    about: dict[str, Any] = {"host": socket.gethostname(), "versions": versions}
    if sys.argv[0].endswith(".py"):  # a script; not a notebook, nor python -c
        about["command"] = shlex.join(["python", *sys.argv])
    return about
