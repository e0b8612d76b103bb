"""What a run tells of itself while it trains, gathered in one place: the loop reports here, and nowhere else."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.config import RunConfig
from moejax.training.metrics import MetricsLog, Progress
from moejax.training.state import learning_rate_schedule


class Recorder:
    """Metrics of a run from step `start` on. As a context, it ends with everything written."""

    def __init__(self, config: RunConfig, start: int, log: Callable[[str], None] = print) -> None:
        self.config = config
        self.metrics_log = MetricsLog(Path(config.directory) / "metrics.jsonl")
        self.metrics_log.rewind(start)
        self.start, self.steps = start, config.steps
        self.progress = Progress(start, self.steps, config.tokens_per_step, log)
        self.schedule = learning_rate_schedule(config.train, config.train.learning_rate, config.steps)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Counts the time within it as spent on `part`: data, save, evaluation; what is left of a step is the step itself."""
        yield

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes note of a finished step (counted from 1) and its metrics, which may still be being computed."""
        if step % self.config.train.log_every and step != self.steps and step != self.start + 1:
            return
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        rate = self.progress.update(step, values["loss"])
        rates = {"learning_rate": float(jnp.asarray(self.schedule(step - 1))), "tokens_per_second": rate}
        self.metrics_log.write({"step": step, "tokens": step * self.config.tokens_per_step, **values, **rates})

    def evaluation(self, step: int, domain: str, values: Mapping[str, float]) -> None:
        """Writes one domain's evaluation, in place of an earlier one of the same step."""
        self.metrics_log.write_evaluation({"step": step, "tokens": step * self.config.tokens_per_step, "domain": domain, **values})
