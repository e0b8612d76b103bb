"""What the devices of a run can do at best, listed or measured, and how much memory the run has taken."""

import functools
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax import numpy as jnp

# Dense peaks in 10^12 FLOP/s of one jax device, by a part of its device_kind in lower case; the first that fits counts. Figures with
# sparsity are twice these. A type that is not here has no listed peak and is measured.
# TPU: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x. In float32 a TPU multiplies in several bfloat16 passes: nothing is listed.
# NVIDIA: the data sheets of A100, H100, H200, DGX B200 (of its eight GPUs one), L4 and T4. float32 is that outside of the tensor
# cores, as moejax multiplies in float32 at full precision. The T4 has no bfloat16.
LISTED_TFLOPS: dict[str, dict[str, float]] = {
    "tpu v4": {"bfloat16": 275},
    "tpu v5 lite": {"bfloat16": 197},
    "tpu v5e": {"bfloat16": 197},
    "tpu v5": {"bfloat16": 459},  # so jax calls the v5p
    "tpu v5p": {"bfloat16": 459},
    "tpu v6 lite": {"bfloat16": 918},
    "tpu v6e": {"bfloat16": 918},
    "tpu7x": {"bfloat16": 2307 / 2},  # a chip is two jax devices
    "a100": {"bfloat16": 312, "float16": 312, "float32": 19.5},
    "h100 pcie": {"bfloat16": 756, "float16": 756, "float32": 51},
    "h100 nvl": {"bfloat16": 835, "float16": 835, "float32": 60},
    "h100": {"bfloat16": 989, "float16": 989, "float32": 67},
    "h200": {"bfloat16": 989, "float16": 989, "float32": 67},
    "b200": {"bfloat16": 2250, "float16": 2250, "float32": 75},
    "l4": {"bfloat16": 121, "float16": 121, "float32": 30.3},
    "t4": {"float16": 65, "float32": 8.1},
}


@dataclass(frozen=True)
class Peak:
    """FLOP/s that all devices of a run reach at best in its compute dtype, and whether that was looked up or tried out."""

    flops_per_second: float
    source: Literal["listed", "measured"]


def find_peak(devices: list[Any], dtype: str) -> Peak:
    """The peak of these devices together: the listed one, else that of a large square matmul on the first of them.

    Devices of the CPU share its cores: their peak is that of one of them, which uses them all.
    """
    listed = listed_peak(devices[0].device_kind, dtype)
    if listed is not None:
        return Peak(listed * len(devices), "listed")
    sharing = 1 if devices[0].platform == "cpu" else len(devices)
    return Peak(measure_peak(devices[0], dtype) * sharing, "measured")


def listed_peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that the maker gives for one device; None where the table has none."""
    words = device_kind.lower()
    for kind, peaks in LISTED_TFLOPS.items():
        if f" {kind} " in f" {words.replace('-', ' ')} ":  # whole words: L4 is not L40
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


@functools.cache
def measure_peak(device: Any, dtype: str) -> float:
    """FLOP/s of a square matmul, 2 * size³ FLOP, the best of three; once a process, since it takes some tenths of a second.

    The size, from 1024 up, is the first that takes 50 ms: less would measure the launch. float32 is full precision, as in the model.
    """
    multiply, best = jax.jit(functools.partial(jnp.matmul, precision="highest")), 0.0
    for size in (1024, 2048, 4096, 8192):
        with jax.default_device(device):
            x = jnp.full((size, size), 0.01, dtype)
        multiply(x, x).block_until_ready()
        seconds = min(_time(lambda x=x: multiply(x, x).block_until_ready()) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.05:
            break
    return best


def _time(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def devices_of(values: Any) -> list[Any]:
    """The devices that the first array among `values` lies on: those the step ran on; without an array, the first device."""
    for leaf in jax.tree.leaves(values):
        if isinstance(leaf, jax.Array):
            return sorted(leaf.sharding.device_set, key=lambda device: device.id)
    return jax.devices()[:1]


def peak_memory_bytes(devices: list[Any]) -> tuple[int, Literal["device", "process"]]:
    """The most memory in use at once so far: of the fullest device where it counts, else the resident set of the whole process."""
    peaks = [stats["peak_bytes_in_use"] for device in devices if "peak_bytes_in_use" in (stats := _memory_stats(device))]
    return (max(peaks), "device") if peaks else (peak_resident_bytes(), "process")


def _memory_stats(device: Any) -> dict[str, int]:
    # Another process's device cannot be asked, and the CPU answers None.
    return (device.memory_stats() or {}) if device.process_index == jax.process_index() else {}


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = read_status("self", "VmHWM")
    if peak is not None:  # Linux: ru_maxrss would be the parent's where that was larger when it started us
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_status(process: int | str, field: str) -> int | None:
    """Bytes of a field that Linux keeps of a process (or "self"), as VmHWM or RssAnon; None elsewhere, and once the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
