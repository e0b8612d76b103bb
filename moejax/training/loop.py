"""The training loop: one jitted step, metrics, evaluation per domain, save and resume."""

import functools
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax import numpy as jnp

from moejax.checkpoint import store
from moejax.config import RunConfig, to_json
from moejax.model.transformer import Transformer, stack_layers, unstack_layers
from moejax.training.metrics import MetricsLog, Progress
from moejax.training.objectives import negative_log_likelihoods, pretrain
from moejax.training.state import TrainState, abstract_state, begin_state, create_optimizer, create_state, learning_rate_schedule


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    model: Transformer, optimizer: optax.GradientTransformation, state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step on one Batch; the state is donated. Metrics are float32 scalars."""

    def objective(params: Any):
        losses, outputs = pretrain(model, {"params": params}, batch)
        return losses.total, (losses, outputs)

    gradients, (losses, outputs) = jax.grad(objective, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    metrics = {
        "loss": losses.ce,
        "router_aux_loss": losses.aux,
        "router_z_loss": losses.z,
        "grad_norm": optax.tree.norm(gradients),
        "expert_load_entropy": load_entropy(outputs.router_statistics),
        "dropped_tokens": outputs.dropped.astype(jnp.float32),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), metrics


def load_entropy(statistics: Any) -> Array:
    """Entropy of the experts' shares of the tokens over its maximum, log E; mean over layers. 1 is perfect balance."""
    if statistics is None or statistics.load.shape[-1] == 1:
        return jnp.float32(1.0)
    share = statistics.load / jnp.maximum(jnp.sum(statistics.load, axis=-1, keepdims=True), 1e-9)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-9)), axis=-1)
    return jnp.mean(entropy) / math.log(statistics.load.shape[-1])


def evaluate(model: Transformer, params: Any, batches: Iterable[Any]) -> tuple[float, int]:
    """Sum of -log p over all counted targets in nats, and their number."""
    total, count = 0.0, 0
    for batch in batches:
        total += float(np.sum(np.asarray(negative_log_likelihoods(model, {"params": params}, batch)), dtype=np.float64))
        count += int(np.sum(np.asarray(batch.weights)))
    return total, count


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out text of one domain: batches that cover every byte once, and the number of UTF-8 bytes they cover."""

    batches: list[Any]
    utf8_bytes: int


@dataclass
class Trainer:
    """A run in progress: the state, where it is kept, and what it reads."""

    config: RunConfig
    model: Transformer
    batch_at: Callable[[int], Any]  # step -> Batch, a pure function: the data's whole state is the step
    evaluation: dict[str, EvaluationSet]
    write_extra: Callable[[Path], None]  # puts what sampling needs (the tokenizer) into a checkpoint
    log: Callable[[str], None] = print
    initial_params: Callable[[], Any] | None = None  # loads the weights that a new run begins with; None: they are drawn

    def __post_init__(self) -> None:
        self.optimizer = create_optimizer(self.config.train)
        self.directory = Path(self.config.directory)

    def restore_or_create(self) -> TrainState:
        """The newest complete checkpoint of the run directory, else a state before the first step."""
        newest = store.latest_step(self.directory)
        if newest is None and self.initial_params is not None:
            return begin_state(self.optimizer, self.initial_params())
        if newest is None:
            return create_state(self.model, self.optimizer, self.config.train.seed)
        step = store.read_metadata(newest).step
        target = abstract_state(self.model, self.optimizer)
        params = store.restore_params(newest, self.config.model)
        if not self.config.model.scan_layers:
            params = unstack_layers(params, self.config.model)
        optimizer_state = store.restore_optimizer(newest, target.optimizer_state)
        self.log(f"resuming {self.directory} at step {step}")
        return TrainState(jnp.int32(step or 0), jax.tree.map(jnp.asarray, params), optimizer_state)

    def save(self, state: TrainState) -> Path:
        """Writes checkpoints/<step>, then removes all but the newest few."""
        step = int(state.step)
        target = store.step_directory(self.directory, step)
        if not target.exists():
            store.save(
                target,
                state.params if self.config.model.scan_layers else stack_layers(state.params, self.config.model),
                self.config.model,
                optimizer=state.optimizer_state,
                step=step,
                run=to_json(self.config),
                write_extra=self.write_extra,
            )
            store.prune(self.directory, self.config.train.keep_checkpoints)
        return target

    def run(self, state: TrainState) -> TrainState:
        """Trains to config.train.steps, saving on the way and when interrupted (then KeyboardInterrupt is raised)."""
        train = self.config.train
        start = int(state.step)
        metrics_log = MetricsLog(self.directory / "metrics.jsonl")
        metrics_log.rewind(start)
        tokens_per_step = train.batch_size * self.config.data.sequence_length
        progress = Progress(start, train.steps, tokens_per_step, self.log)
        schedule = learning_rate_schedule(train, train.learning_rate)
        with interruption() as interrupted:
            for step in range(start, train.steps):
                state, metrics = train_step(self.model, self.optimizer, state, self.batch_at(step))
                done = step + 1
                if done % train.log_every == 0 or done == train.steps or done == start + 1:
                    values = {name: float(value) for name, value in metrics.items()}
                    rate = progress.update(done, values["loss"])
                    row = {"step": done, "tokens": done * tokens_per_step, **values, "learning_rate": float(jnp.asarray(schedule(step)))}
                    metrics_log.write({**row, "tokens_per_second": rate})
                if interrupted():
                    self.log(f"interrupted; saving step {done}: the same command goes on from there")
                    self.save(state)
                    raise KeyboardInterrupt
                if done % train.save_every == 0 or done == train.steps:
                    self.save(state)
                if train.eval_every and done % train.eval_every == 0 and done < train.steps:
                    self.evaluate(state)
            if interrupted():  # during the last save or before the first step: nothing is left to save
                raise KeyboardInterrupt
        return state

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Bits per byte of each domain's held-out text; one row a domain goes to metrics.jsonl, once a step."""
        results = {}
        step = int(state.step)
        metrics_log = MetricsLog(self.directory / "metrics.jsonl")
        for domain, held_out in self.evaluation.items():
            total, count = evaluate(self.model, state.params, held_out.batches)
            results[domain] = total / math.log(2) / held_out.utf8_bytes
            metrics_log.write_evaluation(
                {
                    "step": step,
                    "tokens": step * self.config.train.batch_size * self.config.data.sequence_length,
                    "domain": domain,
                    "eval_loss": total / max(count, 1),
                    "eval_bits_per_byte": results[domain],
                    "eval_bytes": held_out.utf8_bytes,
                }
            )
        return results


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C and SIGTERM only raise a flag, which the yielded function reads; a second one acts at once.

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
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python
