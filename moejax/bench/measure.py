"""How benchmarks measure: warm-up, median and spread, and the machine's own ceilings in the same turns."""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

MATMUL_SIZE = 2048
SETTLED_BELOW = 1.0  # seconds
SWEPT_SHAPE = (4096, 8192)  # of the array that bandwidth is measured on: 134 MB in float32, more than caches hold


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the repeats after warm-up."""

    median: float
    lowest: float
    highest: float


def summarise_seconds(seconds: list[float]) -> Timing:
    """Median and spread of some calls."""
    return Timing(float(np.median(seconds)), min(seconds), max(seconds))


def time_calls(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Times the functions in turns, so that a disturbance of the machine meets all of them alike.

    One that takes less than SETTLED_BELOW seconds is called once more in front of each of its turns, uncounted: what the function before
    it did to caches and memory is not its own time.
    """
    latest = dict.fromkeys(functions, 0.0)
    for _ in range(warmup):
        for name, function in functions.items():
            latest[name] = _time_call(function)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if latest[name] < SETTLED_BELOW:
                jax.block_until_ready(function())
            latest[name] = _time_call(function)
            seconds[name].append(latest[name])
    return {name: summarise_seconds(values) for name, values in seconds.items()}


def _time_call(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def compile_program(function: Any, *arguments: Any) -> tuple[Any, float]:
    """(a jitted function compiled for these arguments, seconds of tracing, lowering and compiling it)."""
    started = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    return compiled, time.perf_counter() - started


def temporary_bytes(compiled: Any) -> int | None:
    """Bytes of temporaries of a compiled program, as XLA plans them; None where it does not say."""
    memory = compiled.memory_analysis()
    return None if memory is None else int(memory.temp_size_in_bytes)


def matmul_ceiling(size: int = MATMUL_SIZE, dtype: str = "float32") -> Callable[[], Any]:
    """A square matmul, 2 * size³ FLOP: what the machine does at its best; in float32 at full precision, as in the model."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(functools.partial(jnp.matmul, precision="highest" if dtype == "float32" else None))
    return lambda: multiply(x, x)


class Ceilings:
    """What the machine can do at its best, as functions to be timed in turns with the thing measured, and what follows from their times.

    A square matmul for FLOP/s. For bytes/s the better of two sweeps over an array that no cache holds: a matrix times a vector, which
    reads it, and a copy onto itself, which reads and writes every entry; a copy to new memory would measure the system's handing it out.
    They take memory of their own: make them after the peak of what is measured was noted.
    """

    def __init__(self, dtype: str = "float32", matmul_size: int = MATMUL_SIZE, swept_shape: tuple[int, int] = SWEPT_SHAPE) -> None:
        self.matmul_flops = 2 * matmul_size**3
        self.swept_bytes = swept_shape[0] * swept_shape[1] * jnp.dtype(dtype).itemsize
        self._vector = jnp.ones(swept_shape[1], dtype)
        self._matrix = [jnp.ones(swept_shape, dtype)]
        self._multiply = jax.jit(jnp.matmul)
        self._negate = jax.jit(jnp.negative, donate_argnums=0)
        self.functions: dict[str, Callable[[], Any]] = {
            "ceiling: matmul": matmul_ceiling(matmul_size, dtype),
            "ceiling: matrix times vector": lambda: self._multiply(self._matrix[0], self._vector),
            "ceiling: copy": self._copy,
        }

    def _copy(self) -> Any:
        self._matrix[0] = self._negate(self._matrix[0])
        return self._matrix[0]

    def results(self, timings: dict[str, Timing]) -> dict[str, float]:
        """`ceiling_flops_per_second` and `ceiling_bytes_per_second`, from the timings of `functions`; and the two sweeps by themselves."""
        read = self.swept_bytes / timings["ceiling: matrix times vector"].median
        copied = 2 * self.swept_bytes / timings["ceiling: copy"].median
        return {
            "ceiling_flops_per_second": self.matmul_flops / timings["ceiling: matmul"].median,
            "ceiling_bytes_per_second": max(read, copied),
            "matrix_times_vector_bytes_per_second": read,
            "copy_bytes_per_second": copied,
        }


def describe_timing(timing: Timing) -> dict[str, float]:
    """Median and spread under the names that every benchmark gives them."""
    return {"seconds": timing.median, "seconds_lowest": timing.lowest, "seconds_highest": timing.highest}


def describe_rates(timing: Timing, ceilings: dict[str, float], tokens: int, flops: float) -> dict[str, Any]:
    """Of one call that takes `tokens` and `flops`: its rates and times, and what part of the ceiling for FLOP/s that is."""
    rate = flops / timing.median
    return {
        "tokens_per_second": tokens / timing.median,
        "flops_per_second": rate,
        "fraction_of_ceiling": rate / ceilings["ceiling_flops_per_second"],
        "bound": "flops",
        **ceilings,
        **describe_timing(timing),
    }


def peak_memory() -> dict[str, int | None]:
    """`peak_resident_bytes` of this process so far; `peak_device_bytes` of the fullest device, None where devices do not count (CPU)."""
    from moejax.training import hardware

    largest, source = hardware.peak_memory_bytes(jax.devices())
    return {"peak_resident_bytes": hardware.peak_resident_bytes(), "peak_device_bytes": largest if source == "device" else None}


def describe_shape(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Some fields of a configuration dataclass, as results carry them."""
    return {name: getattr(config, name) for name in names if name in {field.name for field in dataclasses.fields(config)}}
