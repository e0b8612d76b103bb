"""The training loop: batches through the step, what it measured to the recorder, the state to the saver."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moejax.config import RunConfig
from moejax.model.transformer import Transformer
from moejax.training.evaluation import EvaluationSet, evaluate
from moejax.training.interruption import Agreement, interruption
from moejax.training.placement import place_batches
from moejax.training.recorder import Recorder, Silence
from moejax.training.saving import Saver
from moejax.training.state import TrainState, abstract_state, begin_state, create_optimizer, create_state
from moejax.training.step import check_finite, step_options, train_step_for


@dataclass
class Trainer:
    """A run in progress: the state, where it is kept, and what it reads."""

    config: RunConfig
    model: Transformer
    batches_from: Callable[[int], Iterator[Any]]  # the batches of steps start, start + 1, ...: the data's whole state is one integer
    evaluation: dict[str, EvaluationSet]
    write_extra: Callable[[Path], None]  # puts what sampling needs (the tokenizer) into a checkpoint
    log: Callable[[str], None] = print
    initial_params: Callable[[], Any] | None = None  # loads the weights that a new run begins with; None: they are drawn
    began: float | None = None  # time.perf_counter() when the command began; None: when training does

    def __post_init__(self) -> None:
        self.optimizer = create_optimizer(self.config.train, self.config.steps)
        self.saver = Saver(self.config, self.write_extra, self.log)

    def restore_or_create(self) -> TrainState:
        """The newest complete checkpoint of the run directory, else a state before the first step."""
        restored = self.saver.restore(abstract_state(self.model, self.optimizer))
        if restored is not None:
            return restored
        if self.initial_params is not None:
            return begin_state(self.model, self.optimizer, self.initial_params())
        return create_state(self.model, self.optimizer, self.config.train.seed)

    def run(self, state: TrainState) -> TrainState:
        """Trains to config.steps, saving on the way and when interrupted (then KeyboardInterrupt is raised)."""
        train, steps = self.config.train, self.config.steps
        start, options = int(state.step), step_options(train)
        step = train_step_for(jax.default_backend(), train.compiler_options)
        with interruption() as own, self.open_recorder(start, self.began) as recorder, self.saver as saver:
            interrupted = Agreement(own)
            batches = place_batches(self.model.mesh, train.batch_size, self.batches_from(saver.first_batch(start)))
            before = None  # the metrics of the step before: known by now, so that looking at them waits for nothing
            for done in range(start + 1, steps + 1):
                with recorder.timing("data"):
                    batch = next(batches)
                state, metrics = step(self.model, self.optimizer, state, batch, options)
                recorder.end_step(done, metrics)
                saver.poll()
                if before is not None:
                    check_finite(before, train, done - 1)
                before = metrics
                if interrupted():
                    self.log(f"interrupted; saving step {done}: the same command goes on from there")
                    with recorder.timing("save"):
                        saver.save(state)
                    raise KeyboardInterrupt
                if done % train.save_every == 0 or done == steps:
                    with recorder.timing("save"):
                        saver.save(state)
                if train.eval_every and done % train.eval_every == 0 and done < steps:
                    with recorder.timing("evaluation"):
                        self.evaluate(state, recorder)
            if before is not None:
                check_finite(before, train, steps)
            with recorder.timing("save"):
                saver.wait()
            if interrupted.settle():  # during the last save or before the first step: nothing is left to save
                raise KeyboardInterrupt
        return state

    def open_recorder(self, start: int, began: float | None = None) -> Recorder | Silence:
        """What the run tells from step `start` on; of several processes, the first one tells it."""
        if jax.process_index() != 0:
            return Silence()
        length = self.config.data.sequence_length
        return Recorder(self.config, start, self.log, began=began, tokens_at=lambda step: self.saver.rows_read(step) * length)

    def evaluate(self, state: TrainState, recorder: Recorder | Silence | None = None) -> dict[str, float]:
        """Bits per byte of each domain's held-out text; one row a domain goes to metrics.jsonl, once a step."""
        step = int(state.step)
        if recorder is None:
            with self.open_recorder(step) as recorder:
                return self.evaluate(state, recorder)
        results = {}
        for domain, held_out in self.evaluation.items():
            total, count = evaluate(self.model, state.params, held_out.batches)
            results[domain] = total / math.log(2) / held_out.utf8_bytes
            values = {"eval_loss": total / max(count, 1), "eval_bits_per_byte": results[domain], "eval_bytes": held_out.utf8_bytes}
            recorder.evaluation(step, domain, values)
        return results
