"""A trace of some steps, as jax's profiler writes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moejax.config import RunConfig


class StepTrace:
    """Traces the steps of train.profile_steps that lie after `start`: exactly these, each finished within the trace."""

    def __init__(self, config: RunConfig, start: int, log: Callable[[str], None]) -> None:
        asked = config.train.profiled
        self.steps = range(max(asked.start, start + 1), min(asked.stop, config.steps + 1))
        self.directory, self.log = Path(config.directory) / "profile", log
        self.is_on = False
        if asked and not self.steps and start < config.steps:
            log(f"train.profile_steps={config.train.profile_steps} lies outside of steps {start + 1} to {config.steps}: no trace")

    def begins_with(self, step: int) -> bool:
        """Whether the trace is to begin before this step."""
        return bool(self.steps) and step == self.steps.start and not self.is_on

    def begin(self, earlier: Any) -> None:
        """Starts the trace once `earlier`, what the step before computes, is there."""
        jax.block_until_ready(earlier)
        jax.profiler.start_trace(str(self.directory))
        self.is_on = True

    def ends_with(self, step: int) -> bool:
        """Whether the trace is to end behind this step."""
        return self.is_on and step == self.steps[-1]

    def end(self, last: Any) -> None:
        """Stops the trace once `last`, what its last step computes, is there, and says where it lies."""
        jax.block_until_ready(last)
        self.is_on = False
        jax.profiler.stop_trace()
        files = sorted(self.directory.glob("plugins/profile/*/*.trace.json.gz"))
        self.log(
            f"a trace of steps {self.steps.start} to {self.steps[-1]} is in {self.directory}; open it with xprof --logdir {self.directory} "
            f"(pip install xprof; tensorboard --logdir, with it installed, shows it too), or drop {files[-1] if files else 'its .json.gz'} "
            "into ui.perfetto.dev"
        )
