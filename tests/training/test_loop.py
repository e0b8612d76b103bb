"""The loop: it learns, it measures honestly, and a run that was stopped is the run that was not."""

import dataclasses
import itertools
import json
import math
import os
import signal
import threading

import jax
import numpy as np
import pytest

from moejax.checkpoint import store
from moejax.config import DataConfig, ModelConfig, RunConfig, TrainConfig, UserError
from moejax.data.rows import Batch, pack
from moejax.model.transformer import Transformer
from moejax.training.evaluation import EvaluationSet, evaluate
from moejax.training.interruption import interruption
from moejax.training.loop import Trainer
from moejax.training.starts import read_starts
from moejax.training.state import create_optimizer

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        num_experts=4,
        max_length=64,
        residual_mlp=False,
    ),
    data=DataConfig(sequence_length=16),
    train=TrainConfig(steps=6, batch_size=2, save_every=2, log_every=1, warmup_steps=2, learning_rate=0.03),
)
OPTIMIZER = create_optimizer(CONFIG.train)
TRAINING_KEYS = {
    *("step", "tokens", "loss", "router_aux_loss", "router_z_loss", "grad_norm", "learning_rate"),
    *("tokens_per_second", "expert_load_entropy", "dropped_tokens", "seconds_per_step", "data_wait_fraction", "save_fraction"),
    *("evaluation_fraction", "compile_fraction", "mfu", "goodput", "peak_memory_bytes"),
    *("tokens_counted", "skipped_steps", "skipped_in_a_row", "expert_load_entropy_per_layer", "expert_load_max_over_mean"),
}
# What two runs of the same steps need not have in common.
OF_THE_CLOCK = {
    *("tokens_per_second", "seconds_per_step", "data_wait_fraction", "save_fraction", "evaluation_fraction", "compile_fraction", "mfu"),
    *("goodput", "peak_memory_bytes"),
}
EVALUATION_KEYS = {"step", "tokens", "domain", "eval_loss", "eval_bits_per_byte", "eval_bytes"}


def batch_at(step: int) -> Batch:
    rng = np.random.default_rng(step)
    rows = pack([[1, *rng.integers(3, 32, 20), 2] for _ in range(3)], sequence_length=16)
    return Batch(*map(np.stack, zip(*(rows[index] for index in range(2)), strict=True)))


def make_trainer(directory, batches=batch_at, evaluation=None, **train) -> Trainer:
    config = dataclasses.replace(CONFIG, run_dir=str(directory), train=dataclasses.replace(CONFIG.train, **train))
    trainer = Trainer(
        config,
        Transformer(config.model),
        lambda start: map(batches, itertools.count(start)),
        evaluation or {},
        lambda folder: None,
        log=lambda line: None,
    )
    if config.train.optimizer == "adamw":
        trainer.optimizer = OPTIMIZER  # the same object: nothing is compiled twice
    return trainer


def train_from_start(directory, **options):
    trainer = make_trainer(directory, **options)
    return trainer, trainer.run(trainer.restore_or_create())


def read_rows(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_equal_trees(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def strip_times(rows):
    return [{name: value for name, value in row.items() if name not in OF_THE_CLOCK} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six steps without a stop: (directory, final state)."""
    directory = tmp_path_factory.mktemp("straight")
    return directory, train_from_start(directory)[1]


def test_a_repeated_batch_is_learnt(tmp_path):
    train_from_start(tmp_path, batches=lambda step: batch_at(0), steps=30, save_every=100)
    losses = [row["loss"] for row in read_rows(tmp_path)]
    assert losses[0] == pytest.approx(math.log(32), abs=0.2)  # knows nothing at first
    assert losses[-1] < losses[0] / 2


def test_a_row_of_metrics_has_what_it_should(straight):
    rows = read_rows(straight[0])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [32 * step for step in range(1, 7)]
    assert all(set(row) == TRAINING_KEYS for row in rows)
    assert rows[0]["learning_rate"] == pytest.approx(0.015)
    assert rows[1]["learning_rate"] == pytest.approx(0.03)
    assert all(0 < row["expert_load_entropy"] <= 1 for row in rows)
    assert all(
        math.isfinite(value) and row["grad_norm"] > 0 and row["tokens_per_second"] > 0
        for row in rows
        for value in np.hstack(list(row.values()))
    )


def test_a_run_tells_of_its_starts_and_to_tensorboard(straight):
    (start,) = read_starts(straight[0] / "starts.jsonl")
    assert (start["first_step"], start["last_step"], start["ended"], start["devices"]) == (1, 6, "done", 1)
    assert start["save_seconds"] > 0
    assert len(list((straight[0] / "tensorboard").iterdir())) == 1
    assert not (straight[0] / "profile").exists()


def test_steps_that_are_not_finite_end_a_run_when_they_come_in_a_row(tmp_path):
    def batches(step):
        batch = batch_at(step)
        return batch._replace(weights=batch.weights * np.float32(np.nan)) if step in (1, 3, 4) else batch

    with pytest.raises(UserError, match=r"steps 4 to 5.*train\.max_nonfinite_steps=2"):
        train_from_start(tmp_path, batches=batches, max_nonfinite_steps=2, save_every=100)
    rows = read_rows(tmp_path)
    assert [row["skipped_steps"] for row in rows[:4]] == [0, 1, 1, 2]
    train_from_start(tmp_path / "once", batches=batches, max_nonfinite_steps=3, save_every=100)
    assert [row["skipped_steps"] for row in read_rows(tmp_path / "once")] == [0, 1, 1, 2, 3, 3]


def test_rows_come_as_often_as_said(tmp_path):
    train_from_start(tmp_path, steps=5, log_every=2, save_every=100)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 4, 5]  # the first and the last too


def test_the_newest_checkpoints_are_kept(straight, tmp_path):
    assert [path.name for path in store.list_steps(straight[0])] == ["00000004", "00000006"]
    train_from_start(tmp_path, steps=3, save_every=1, keep_checkpoints=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003"]


def test_a_run_that_was_stopped_is_the_run_that_was_not(straight, tmp_path):
    """Killed after step 5: what the step-4 checkpoint did not hold is done again, and written once."""

    class Killed(BaseException):
        pass

    def batches(step):
        if step == 5:
            raise Killed
        return batch_at(step)

    with pytest.raises(Killed):
        train_from_start(tmp_path, batches=batches)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4, 5]
    read = []
    _trainer, state = train_from_start(tmp_path, batches=lambda step: read.append(step) or batch_at(step))
    assert read == [4, 5]
    assert_equal_trees(state, straight[1])
    assert strip_times(read_rows(tmp_path)) == strip_times(read_rows(straight[0]))


def test_a_finished_run_is_not_trained_further(straight):
    def batches(step):
        raise AssertionError("a batch was read")

    before = read_rows(straight[0])
    _, state = train_from_start(straight[0], batches=batches)
    assert_equal_trees(state, straight[1])
    assert read_rows(straight[0]) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_the_step_it_is_in(straight, tmp_path, number):
    def batches(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return batch_at(step)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train_from_start(tmp_path, batches=batches)
    assert signal.getsignal(number) is handler
    assert store.latest_step(tmp_path) == tmp_path / "checkpoints" / "00000003"
    assert_equal_trees(train_from_start(tmp_path)[1], straight[1])


def test_an_interruption_during_the_last_save_is_not_lost(tmp_path):
    trainer = make_trainer(tmp_path, steps=1)
    trainer.saver.write_extra = lambda folder: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(trainer.restore_or_create())
    assert store.latest_step(tmp_path) == tmp_path / "checkpoints" / "00000001"


def test_a_second_interruption_acts_at_once():
    with interruption() as interrupted, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal was swallowed")


def test_training_in_another_thread(straight, tmp_path):
    """Notebooks may run cells there; signals stay with the main thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train_from_start(tmp_path)[1]))
    thread.start()
    thread.join()
    assert_equal_trees(results[0], straight[1])


@pytest.mark.slow
def test_unrolled_layers_are_saved_and_resumed_too(straight, tmp_path):
    model = dataclasses.replace(CONFIG.model, scan_layers=False)

    def run(steps):
        config = dataclasses.replace(CONFIG, run_dir=str(tmp_path), model=model, train=dataclasses.replace(CONFIG.train, steps=steps))
        trainer = Trainer(
            config, Transformer(model), lambda start: map(batch_at, itertools.count(start)), {}, lambda folder: None, log=lambda line: None
        )
        return trainer, trainer.run(trainer.restore_or_create())

    _, state = run(2)
    _trainer, resumed = run(2)
    assert_equal_trees(state, resumed)
    saved = store.restore_params(store.latest_step(tmp_path), model)
    assert jax.tree.structure(saved) == jax.tree.structure(straight[1].params)  # the stacked tree, as in every checkpoint


def test_another_optimizer_is_refused(straight):
    with pytest.raises(UserError, match="another optimiser"):
        make_trainer(straight[0], optimizer="muon").restore_or_create()


def test_a_model_that_knows_nothing_needs_log_v_bits_a_token(straight, tmp_path):
    """A head of zeros gives every token the probability 1 / V."""
    _, state = straight
    uniform = state.replace(params={**state.params, "head": {"kernel": np.zeros((32, 16), np.float32)}})
    batches = [batch_at(0), batch_at(1)]
    tokens = int(sum(batch.weights.sum() for batch in batches))
    trainer = make_trainer(tmp_path, evaluation={"code": EvaluationSet(batches, 77), "prose": EvaluationSet(batches[:1], 10)})
    results = trainer.evaluate(uniform)
    assert results["code"] == pytest.approx(math.log2(32) * tokens / 77, rel=1e-6)
    assert evaluate(trainer.model, uniform.params, batches)[1] == tokens
    rows = read_rows(tmp_path)
    assert [row["domain"] for row in rows] == ["code", "prose"]
    assert all(set(row) == EVALUATION_KEYS and row["step"] == 6 for row in rows)
    assert rows[0]["eval_loss"] == pytest.approx(math.log(32), rel=1e-6)
    assert rows[0]["eval_bits_per_byte"] == results["code"]
    trainer.evaluate(uniform)
    assert len(read_rows(tmp_path)) == 2  # once a step, however often it is started


def test_evaluation_on_the_way(tmp_path):
    train_from_start(tmp_path, evaluation={"code": EvaluationSet([batch_at(9)], 50)}, steps=5, eval_every=2, save_every=100)
    assert [row["step"] for row in read_rows(tmp_path) if "domain" in row] == [2, 4]
