"""A trace has the steps it was asked for, and a run without one has none."""

import gzip
import json

import jax
import pytest
from jax import numpy as jnp

from moejax.config import RunConfig, TrainConfig
from moejax.training.trace import StepTrace


def make_trace(directory, steps, start=0, log=lambda line: None):
    return StepTrace(RunConfig(run_dir=str(directory), train=TrainConfig(steps=20, profile_steps=steps)), start, log)


@pytest.mark.parametrize(
    ("steps", "start", "traced"),
    [("10:13", 0, [10, 11, 12, 13]), ("10:13", 11, [12, 13]), ("1:1", 0, [1]), ("19:25", 0, [19, 20]), (None, 0, []), ("3:4", 4, [])],
)
def test_the_steps_between_begin_and_end(monkeypatch, tmp_path, steps, start, traced):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("off"))
    trace = make_trace(tmp_path, steps, start)
    for step in range(start + 1, 21):
        if trace.begins_with(step):
            trace.begin(None)
        calls.append(step)
        if trace.ends_with(step):
            trace.end(None)
    between = calls[calls.index("on") + 1 : calls.index("off")] if traced else []
    assert between == traced
    assert calls.count("on") == calls.count("off") == bool(traced)


def test_steps_that_are_past_are_said_to_be(tmp_path):
    lines = []
    make_trace(tmp_path, "3:4", 4, lines.append)
    assert lines == ["train.profile_steps=3:4 lies outside of steps 5 to 20: no trace"]
    make_trace(tmp_path, "10:13", 4, lines.append)
    make_trace(tmp_path, None, 4, lines.append)
    make_trace(tmp_path, "3:4", 20, lines.append)  # a run that is done takes no steps at all
    assert len(lines) == 1


def test_a_trace_is_a_file_that_a_line_tells_how_to_open(tmp_path):
    lines = []
    trace = make_trace(tmp_path, "2:3", log=lines.append)
    function = jax.jit(lambda x: jnp.sin(x) @ x)
    x = function(jnp.ones((8, 8)))
    trace.begin(x)
    x = function(x)
    trace.end(x)
    assert not trace.is_on
    (file,) = (tmp_path / "profile").glob("plugins/profile/*/*.trace.json.gz")
    assert json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert len(lines) == 1
    assert [word for word in ("steps 2 to 3", str(tmp_path / "profile"), str(file), "xprof", "perfetto") if word not in lines[0]] == []
