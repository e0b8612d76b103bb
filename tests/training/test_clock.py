"""Time falls into parts, each second into one; compiling is what jax says it is."""

import threading
import time

import jax
import pytest
from jax import numpy as jnp

from moejax.training.clock import CompileTimer, StepClock

COMPILING = "/jax/core/compile/backend_compile_duration"


def test_every_second_falls_into_one_part(clock):
    compiled = [0.0]
    steps = StepClock(clock, lambda: compiled[0])
    with steps.part("data"):
        clock.now += 1
    clock.now += 10  # a step, 4 seconds of which compiled
    compiled[0] += 4
    with steps.part("evaluation"):
        clock.now += 5
        compiled[0] += 3  # compiling for an evaluation is part of it
    with steps.part("data"):
        clock.now += 2
    spent = steps.take()
    assert (spent.seconds, spent.steps) == (18, 6)
    assert spent.parts == {"data": 3, "evaluation": 5, "compile": 4}
    assert spent.share("evaluation") == pytest.approx(5 / 18)
    assert spent.share("save") == 0
    clock.now += 7
    assert (steps.take().seconds, steps.take().steps) == (7, 0)


def test_a_part_that_fails_is_counted(clock):
    steps = StepClock(clock, lambda: 0.0)
    with pytest.raises(KeyError), steps.part("save"):
        clock.now += 3
        raise KeyError
    assert steps.take().parts["save"] == 3


def test_functions_within_functions_compile_once(clock):
    """Events come at their ends: an inner one before the outer one that contains it."""
    timer = CompileTimer(clock)
    timer.listen()
    try:
        for end, duration in [(51, 1), (53, 1), (54, 4), (60, 2), (61, 0.5)]:
            clock.now = end
            jax.monitoring.record_event_duration_secs(COMPILING, duration)
        assert timer.seconds == pytest.approx(4 + 2 + 0.5)
        jax.monitoring.record_event_duration_secs("/jax/something/else", 100)
        other = threading.Thread(target=lambda: jax.monitoring.record_event_duration_secs(COMPILING, 100))
        other.start()
        other.join()
        assert timer.seconds == pytest.approx(6.5)
    finally:
        timer.stop()
    jax.monitoring.record_event_duration_secs(COMPILING, 1)
    assert timer.seconds == pytest.approx(6.5)


def test_jax_reports_what_it_compiles_and_nothing_else():
    timer = CompileTimer()
    timer.listen()
    try:
        function, x = jax.jit(lambda x: jnp.sin(x) @ x), jnp.ones((64, 64))
        before, started = timer.seconds, time.perf_counter()
        function(x).block_until_ready()
        compiling = timer.seconds - before
        assert 0.001 < compiling <= time.perf_counter() - started
        function(x).block_until_ready()
        assert timer.seconds - before == compiling
    finally:
        timer.stop()
