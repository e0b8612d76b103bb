"""What a run tells of itself while it trains, gathered in one place: the loop reports here, and nowhere else."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import RunConfig
from moejax.families.flops import count_flops
from moejax.training import hardware
from moejax.training.clock import CompileTimer, Spent, StepClock
from moejax.training.metrics import MetricsLog, Progress
from moejax.training.starts import StartsLog, describe_start
from moejax.training.state import learning_rate_schedule
from moejax.training.trace import StepTrace
from moejax.training.trackers import TensorBoard, WeightsAndBiases, open_trackers, require_wandb


class Recorder:
    """Metrics of a run from step `start` on. As a context, it ends with everything written.

    `began` is when the command began, by `clock`; None: now. `tokens_at` says how many tokens the run has read after a step, where that is
    not a multiple of it. Raises UserError where Weights & Biases is wanted and not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        start: int,
        log: Callable[[str], None] = print,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        tokens_at: Callable[[int], int] | None = None,
    ) -> None:
        self.config, self.log, self.clock = config, log, clock
        self.tokens_at = tokens_at or (lambda step: step * config.tokens_per_step)
        self.start, self.step = start, start  # the last step taken before, and so far
        self.began = clock() if began is None else began
        directory = Path(config.directory)
        self.metrics_log = MetricsLog(directory / "metrics.jsonl")
        self.metrics_log.rewind(start)
        self.starts_log = StartsLog(directory / "starts.jsonl")
        self.progress = Progress(config.steps, log)
        self.schedule = learning_rate_schedule(config.train, config.train.learning_rate, config.steps)
        self.flops_per_step = count_flops(config.model, config.train.batch_size, config.data.sequence_length)
        self.trace = StepTrace(config, start, log)
        require_wandb(config)
        self.trackers: list[TensorBoard | WeightsAndBiases] | None = None  # opened with the first step, or the first evaluation
        self.compile_timer = CompileTimer(clock)
        self.step_clock: StepClock | None = None  # from the first step's data on
        self.row_step, self.row_spent = start, Spent()  # the step of the last row, and what was spent since
        self.peak: hardware.Peak | None = None
        self.latest: Any = None  # metrics of the last step; they may still be being computed
        self.evaluated: dict[str, float] = {}

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # What is written here is worth less than the error that ends the run: it must not take its place.
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
            if self.trace.is_on:
                self.trace.end(None)
            if self.step_clock is not None:
                self.compile_timer.stop()
                self._note_spent()
                self.starts_log.end(self._describe_end(kind))
            for tracker in self.trackers or ():
                tracker.close()

    def _describe_end(self, kind: type[BaseException] | None) -> str:
        if kind is None:
            return "done" if self.step >= self.config.steps else "stopped"
        return "interrupted" if issubclass(kind, KeyboardInterrupt) else f"failed: {kind.__name__}"

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Counts the time within it as spent on `part`: data, save, evaluation; what is left of a step is the step itself."""
        clock = self.step_clock or self._begin()
        if part == "data":
            if self.trace.begins_with(self.step + 1):
                with clock.part("trace"):
                    self.trace.begin(self.latest)
            with clock.part("data"):
                yield
            return
        jax.block_until_ready(self.latest)  # steps under way are steps: what comes now would only be the one to wait for them
        with clock.part(part):
            yield
            self._tell_evaluated()
        if part == "save":  # now, so that the steps which a checkpoint keeps are known to goodput however soon a kill comes
            self._note_spent()

    def _begin(self) -> StepClock:
        """The first step is about to begin: what came before was starting up."""
        self._open_trackers()
        first = hardware.devices_of(None)
        hardware.find_peak(first, self.config.model.dtype)  # where it is measured, that takes a moment: not within a step
        self.compile_timer.listen()
        self.step_clock = StepClock(self.clock, lambda: self.compile_timer.seconds)
        facts = {"dtype": self.config.model.dtype, "flops_per_step": self.flops_per_step, **describe_start()}
        self.starts_log.begin(self.start + 1, self.step_clock.since - self.began, facts)
        return self.step_clock

    def _open_trackers(self) -> list[TensorBoard | WeightsAndBiases]:
        if self.trackers is None:
            self.trackers = open_trackers(self.config, self.start, self.log)
        return self.trackers

    def _see_devices(self, devices: list[Any]) -> hardware.Peak:
        """The peak of the devices that the steps run on, which the first row's metrics show; this start's line names them."""
        if self.peak is None:
            self.peak = hardware.find_peak(devices, self.config.model.dtype)
            self.starts_log.tell(
                device=devices[0].device_kind,
                devices=len(devices),
                peak_flops_per_second=self.peak.flops_per_second,
                peak_source=self.peak.source,
                memory_source=hardware.peak_memory_bytes(devices)[1],
            )
        return self.peak

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes note of a finished step (counted from 1) and its metrics, which may still be being computed.

        They are waited for only where a row is due: at the first step, the last, and every log_every-th.
        """
        clock = self.step_clock or self._begin()
        self.step, self.latest = step, metrics
        if self.trace.ends_with(step):
            jax.block_until_ready(metrics)
            with clock.part("trace"):
                self.trace.end(metrics)
        if step % self.config.train.log_every and step != self.config.steps and step != self.start + 1:
            return
        fetched = jax.device_get(list(metrics.values()))  # all at once
        values = {name: np.asarray(value).tolist() for name, value in zip(metrics, fetched, strict=True)}
        if "learning_rate" not in values:
            taken = step - int(values.get("skipped_steps", 0))  # the optimiser does not count a step that was skipped
            values["learning_rate"] = float(jnp.asarray(self.schedule(max(taken - 1, 0))))
        devices = hardware.devices_of(metrics)
        peak = self._see_devices(devices)
        self._note_spent()
        steps, spent = step - self.row_step, self.row_spent
        self.row_step, self.row_spent = step, Spent()
        row = {"step": step, "tokens": self.tokens_at(step), **values, **self._measure(steps, spent, peak)}
        row["peak_memory_bytes"] = hardware.peak_memory_bytes(devices)[0]
        self.metrics_log.write(row)
        self._track(row)
        self.progress.update(row, self.clock(), spent.seconds)

    def _note_spent(self) -> None:
        """Carries the time spent since the last call to the row that comes next and to this start's line."""
        if self.step_clock is not None:
            spent = self.step_clock.take()
            self.row_spent.add(spent)
            self.starts_log.progress(self.step, spent)

    def _measure(self, steps: int, spent: Spent, peak: hardware.Peak) -> dict[str, float]:
        """Rates and shares over the steps since the row before, and goodput; docs/training.md says of what."""
        # Waiting for data slows the training down and belongs into its rate; what happens once in a while does not.
        seconds = max(spent.steps + spent.parts.get("data", 0.0), 1e-9) / steps
        tracing = {"trace_fraction": spent.share("trace")} if "trace" in spent.parts else {}
        return {
            "tokens_per_second": self.config.tokens_per_step / seconds,
            "seconds_per_step": seconds,
            "data_wait_fraction": spent.share("data"),
            "save_fraction": spent.share("save"),
            "evaluation_fraction": spent.share("evaluation"),
            "compile_fraction": spent.share("compile"),
            **tracing,
            "mfu": self.flops_per_step / seconds / peak.flops_per_second,
            "goodput": self.starts_log.goodput,
        }

    def evaluation(self, step: int, domain: str, values: Mapping[str, float]) -> None:
        """Writes one domain's evaluation, in place of an earlier one of the same step."""
        row = {"step": step, "tokens": self.tokens_at(step), "domain": domain, **values}
        self.metrics_log.write_evaluation(row)
        self._track(row)
        if "eval_bits_per_byte" in values:
            self.evaluated[domain] = values["eval_bits_per_byte"]

    def _tell_evaluated(self) -> None:
        if self.evaluated:
            self.progress.evaluated(self.step, self.evaluated)
            self.evaluated = {}

    def _track(self, row: Mapping[str, Any]) -> None:
        for tracker in self._open_trackers():
            tracker.write(row)


class Silence:
    """In place of a Recorder where several processes train together: the first one tells of the run, the others nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def timing(self, part: str) -> contextlib.AbstractContextManager[None]:
        """Counts nothing."""
        return contextlib.nullcontext()

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at nothing."""

    def evaluation(self, step: int, domain: str, values: Mapping[str, float]) -> None:
        """Writes nothing."""
