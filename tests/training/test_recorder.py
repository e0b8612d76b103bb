"""What the recorder says of a run, by a clock that moves when it is told to."""

import json
import time

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.config import DataConfig, ModelConfig, RunConfig, TrainConfig, UserError
from moejax.families.flops import count_flops
from moejax.training import hardware, trackers
from moejax.training.recorder import Recorder
from moejax.training.starts import read_starts

MODEL = ModelConfig(hidden_size=32, intermediate_size=16, num_layers=2, num_experts=4, vocab_size=64)
PEAK = 1e9
COMPILING = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def clock(clock, monkeypatch):
    """The clock, and a device that does 10^9 FLOP/s."""
    monkeypatch.setattr(hardware, "find_peak", lambda devices, dtype: hardware.Peak(PEAK * len(devices), "listed"))
    return clock


def make_config(directory, **train) -> RunConfig:
    options = {"steps": 20, "batch_size": 4, "log_every": 5, "tensorboard": False, **train}
    return RunConfig(run_dir=str(directory), model=MODEL, data=DataConfig(sequence_length=8), train=TrainConfig(**options))


def make_metrics(step, **values):
    return {"loss": np.float32(8 - step / 10), "grad_norm": np.float32(1.5), "learning_rate": np.float32(0.25), **values}


def take_steps(recorder, clock, steps, metrics=make_metrics):
    """Steps of 2 s, of which half a second is waiting for data, as the loop takes them."""
    for step in steps:
        with recorder.timing("data"):
            clock.now += 0.5
        clock.now += 1.5
        recorder.end_step(step, metrics(step))


def read_rows(directory):
    return [
        json.loads(line, parse_constant=lambda text: pytest.fail(text)) for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


def test_rates_leave_out_what_is_no_step(tmp_path, clock):
    """Compiling in the first step, a save and an evaluation between rows: none of them slows the steps down."""
    config, lines = make_config(tmp_path), []
    flops = count_flops(MODEL, 4, 8)
    with Recorder(config, 0, lines.append, began=clock.now - 30, clock=clock) as recorder:
        with recorder.timing("data"):
            clock.now += 0.5
        clock.now += 40
        jax.monitoring.record_event_duration_secs(COMPILING, 40.0)
        clock.now += 1.5
        recorder.end_step(1, make_metrics(1))
        take_steps(recorder, clock, range(2, 4))
        with recorder.timing("save"):
            clock.now += 6
        with recorder.timing("evaluation"):
            clock.now += 3
            jax.monitoring.record_event_duration_secs(COMPILING, 2.0)
            recorder.evaluation(3, "code", {"eval_bits_per_byte": 2.25})
            recorder.evaluation(3, "prose", {"eval_bits_per_byte": 1.5})
        take_steps(recorder, clock, range(4, 21))
    first, _, _, second, *_, last = rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 3, 3, 5, 10, 15, 20]
    for row in (first, second, last):
        assert row["seconds_per_step"] == pytest.approx(2)
        assert row["tokens_per_second"] == pytest.approx(4 * 8 / 2)
        assert row["mfu"] == pytest.approx(flops / 2 / PEAK)
    assert first["compile_fraction"] == pytest.approx(40 / 42)
    assert (second["data_wait_fraction"], second["save_fraction"]) == pytest.approx((2 / 17, 6 / 17))
    assert (second["evaluation_fraction"], second["compile_fraction"]) == pytest.approx((3 / 17, 0))
    assert (last["data_wait_fraction"], last["save_fraction"]) == pytest.approx((0.25, 0))
    assert last["goodput"] == pytest.approx(20 * 1.5 / (30 + 40 + 40 + 9))
    assert lines[0] == "step 1/20  loss 7.900  (compiled in 0:42)"
    assert lines[1] == "step 3/20  held-out bits per byte: code 2.250  prose 1.500"
    assert len(lines) == 1 + 1 + 4
    (start,) = read_starts(tmp_path / "starts.jsonl")
    assert (start["ended"], start["seconds"], start["startup_seconds"]) == ("done", pytest.approx(119), 30)
    assert start["step_seconds"] == pytest.approx(30)


def test_a_killed_start_counts_for_what_its_checkpoint_kept(tmp_path, clock):
    config = make_config(tmp_path)
    killed = Recorder(config, 0, print, clock=clock)
    take_steps(killed, clock, range(1, 8))
    with killed.timing("save"):  # the checkpoint of step 7, which is no step of a row
        clock.now += 1
    take_steps(killed, clock, range(8, 12))
    killed.compile_timer.stop()  # no __exit__: it is gone
    with Recorder(config, 7, print, clock=clock) as recorder:
        take_steps(recorder, clock, range(8, 21))
    before, after = read_starts(tmp_path / "starts.jsonl")
    assert (before["last_step"], before["ended"], before["seconds"]) == (10, None, 21)  # what came after the row of 10 is lost
    assert (after["first_step"], after["last_step"]) == (8, 20)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 5, 8, 10, 15, 20]
    assert read_rows(tmp_path)[-1]["goodput"] == pytest.approx((7 * 1.5 + 13 * 1.5) / (21 + 26))


def test_metrics_of_layers_are_lists_and_what_is_undefined_is_null(tmp_path, clock):
    with Recorder(make_config(tmp_path, steps=2, log_every=1), 0, print, clock=clock) as recorder:
        extra = {"loads": jnp.array([1.5, jnp.nan]), "skipped_steps": jnp.int32(3), "tokens_counted": np.float32(30)}
        take_steps(recorder, clock, (1, 2), lambda step: make_metrics(step, loss=jnp.float32(jnp.inf), **extra))
    row = read_rows(tmp_path)[-1]
    assert (row["loads"], row["skipped_steps"], row["tokens_counted"], row["loss"]) == ([1.5, None], 3, 30.0, None)
    assert isinstance(row["skipped_steps"], int)
    assert list(row)[:5] == ["step", "tokens", "loss", "grad_norm", "learning_rate"]


def test_a_rate_of_learning_that_the_step_does_not_tell_is_the_schedule_s(tmp_path, clock):
    config = make_config(tmp_path, steps=2, warmup_steps=2, learning_rate=0.5)
    with Recorder(config, 0, print, clock=clock) as recorder:
        take_steps(recorder, clock, (1, 2), lambda step: {"loss": jnp.float32(1)})
    assert [row["learning_rate"] for row in read_rows(tmp_path)] == [0.25, 0.5]


def test_skipped_steps_do_not_move_the_rate_of_learning(tmp_path, clock):
    config = make_config(tmp_path, steps=4, warmup_steps=4, learning_rate=1.0, log_every=1)
    with Recorder(config, 0, print, clock=clock) as recorder:
        take_steps(recorder, clock, (1, 2, 3, 4), lambda step: {"loss": jnp.float32(1), "skipped_steps": jnp.int32(step >= 3)})
    assert [row["learning_rate"] for row in read_rows(tmp_path)] == [0.25, 0.5, 0.5, 0.75]


def test_tokens_are_those_that_the_run_has_read(tmp_path, clock):
    """Another batch size before a restart: they are no multiple of the step."""
    with Recorder(make_config(tmp_path, steps=4, log_every=1), 2, print, clock=clock, tokens_at=lambda step: 1000 + step) as recorder:
        take_steps(recorder, clock, (3, 4))
        recorder.evaluation(4, "code", {"eval_bits_per_byte": 1.0})
    assert [row["tokens"] for row in read_rows(tmp_path)] == [1003, 1004, 1004]


class Unready:
    """A metric that may not be looked at."""

    def __array__(self, *args, **kwargs):
        raise AssertionError("waited for the device")

    block_until_ready = __float__ = __array__


def test_between_rows_nothing_is_waited_for_and_hardly_any_time_taken(tmp_path, clock):
    recorder = Recorder(make_config(tmp_path, steps=10_000, log_every=9_000), 0, print, clock=clock)
    take_steps(recorder, clock, (1,))
    metrics = {"loss": Unready()}
    started = time.perf_counter()
    for step in range(2, 2002):
        with recorder.timing("data"):
            pass
        recorder.end_step(step, metrics)
    assert (time.perf_counter() - started) / 2000 < 200e-6  # measured: 3 us
    recorder.compile_timer.stop()


@pytest.mark.parametrize(
    ("error", "end"), [(KeyboardInterrupt, "interrupted"), (UserError, "failed: UserError"), (None, "stopped")], ids=str
)
def test_a_start_says_how_it_ended(tmp_path, clock, error, end):
    def go():
        with Recorder(make_config(tmp_path), 0, print, clock=clock) as recorder:
            take_steps(recorder, clock, (1, 2))
            if error is not None:
                raise error

    if error is None:
        go()
    else:
        with pytest.raises(error):
            go()
    (start,) = read_starts(tmp_path / "starts.jsonl")
    assert (start["ended"], start["last_step"]) == (end, 2)


def test_writing_at_the_end_does_not_hide_what_went_wrong(tmp_path, clock, monkeypatch):
    def full(*args):
        raise OSError(28, "no space")

    with pytest.raises(UserError, match="the disk is full"), Recorder(make_config(tmp_path), 0, print, clock=clock) as recorder:
        take_steps(recorder, clock, (1,))
        monkeypatch.setattr(recorder.starts_log, "progress", full)
        raise UserError("the disk is full")
    with pytest.raises(OSError, match="no space"), Recorder(make_config(tmp_path), 1, print, clock=clock) as recorder:
        take_steps(recorder, clock, (2,))
        monkeypatch.setattr(recorder.starts_log, "progress", full)


def test_an_evaluation_alone_is_no_start(tmp_path, clock):
    with Recorder(make_config(tmp_path, tensorboard=True), 20, print, clock=clock) as recorder:
        recorder.evaluation(20, "code", {"eval_bits_per_byte": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_missing_wandb_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    with pytest.raises(UserError, match="pip install wandb"):
        Recorder(make_config(tmp_path, wandb="moe"), 0)


def test_a_trace_has_the_steps_asked_for_and_their_data(tmp_path, clock, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append(("on", recorder.step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("off", recorder.step)))
    with Recorder(make_config(tmp_path, profile_steps="3:4"), 0, print, clock=clock) as recorder:
        take_steps(recorder, clock, range(1, 7))
    assert calls == [("on", 2), ("off", 4)]
    assert ["trace_fraction" in row for row in read_rows(tmp_path)] == [False, True]
    calls.clear()
    with pytest.raises(KeyboardInterrupt), Recorder(make_config(tmp_path, profile_steps="3:4"), 0, print, clock=clock) as recorder:
        take_steps(recorder, clock, range(1, 4))
        raise KeyboardInterrupt
    assert calls == [("on", 2), ("off", 3)]
