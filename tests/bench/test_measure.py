"""How benchmarks measure: in turns, after warming up, with ceilings that are what their times say."""

from __future__ import annotations

import jax
import numpy as np
from jax import numpy as jnp

from moejax.bench import measure
from moejax.bench.measure import Ceilings, Timing


def test_functions_are_called_in_turns_and_warming_up_does_not_count(monkeypatch):
    calls, clock = [], iter(np.arange(100.0) ** 2 + 0.5 * np.arange(100))  # ever slower, and never below SETTLED_BELOW
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    timings = measure.time_calls({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert timings == {"a": Timing(17.5, 9.5, 25.5), "b": Timing(21.5, 13.5, 29.5)}


def test_a_fast_function_is_called_once_more_in_front_of_each_turn(monkeypatch):
    calls, now = [], [0.0]

    def take(name, seconds):
        calls.append(name)
        now[0] += seconds

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    timings = measure.time_calls({"fast": lambda: take("fast", 0.25), "slow": lambda: take("slow", 4.0)}, repeats=2, warmup=1)
    assert calls == ["fast", "slow"] + ["fast", "fast", "slow"] * 2
    assert (timings["fast"].median, timings["slow"].median) == (0.25, 4.0)


def test_ceilings_are_flop_and_bytes_over_seconds():
    ceilings = Ceilings("bfloat16", matmul_size=8, swept_shape=(4, 16))
    names = list(ceilings.functions)
    seconds = dict(zip(names, (2.0, 4.0, 1.0), strict=True))
    results = ceilings.results({name: Timing(value, 0.1, 9.0) for name, value in seconds.items()})
    assert results["ceiling_flops_per_second"] == 2 * 8**3 / 2.0
    assert results["matrix_times_vector_bytes_per_second"] == 4 * 16 * 2 / 4.0
    assert results["copy_bytes_per_second"] == 2 * 4 * 16 * 2 / 1.0  # read and written
    assert results["ceiling_bytes_per_second"] == results["copy_bytes_per_second"]


def test_ceilings_can_be_called_again_and_again():
    ceilings = Ceilings(matmul_size=8, swept_shape=(4, 16))
    for _ in range(3):
        shapes = [jax.block_until_ready(function()).shape for function in ceilings.functions.values()]
        assert shapes == [(8, 8), (4,), (4, 16)]


def test_compiling_tells_its_seconds_and_temporaries():
    function = jax.jit(lambda x: jnp.sort(jnp.sin(x))[::-1] @ jnp.cos(x))
    compiled, seconds = measure.compile_program(function, jnp.ones(1 << 12))
    assert seconds > 0 and compiled(jnp.ones(1 << 12)).shape == ()
    assert measure.temporary_bytes(compiled) >= 4 << 12
