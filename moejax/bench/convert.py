"""Converting a synthetic checkpoint with Mixtral 8x7B's names and widths: memory and time, against `cp -r && sync` of the same files."""

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moejax.bench.measure import describe_timing, summarise_seconds
from moejax.bench.output import Output, report
from moejax.checkpoint.names import list_sources
from moejax.config import UserError
from moejax.families.mixtral import MIXTRAL
from moejax.training.hardware import read_status

SHARD_BYTES = 5_000_000_000
SAMPLED_EVERY = 0.02  # seconds


@dataclass(frozen=True)
class Arguments(Output):
    """Makes a bfloat16 checkpoint of `layers` layers (2: 6.4 GB, 6: 18 GB), copies it, converts it; needs three times its size of disk."""

    directory: str = ""  # an empty or new directory on the disk to be measured; what is written there is removed
    layers: int = 2
    repeats: int = 1
    dtype: str | None = None
    verify: bool = False


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    if not arguments.directory:
        raise UserError("give --directory: a new directory on the disk to be measured, which is removed at the end")
    work = Path(arguments.directory).absolute()
    if work.exists() and any(work.iterdir()):
        raise UserError(f"{work} is not empty; give a new directory")
    work.mkdir(parents=True, exist_ok=True)
    try:
        largest = write_synthetic(work / "source", arguments.layers)
        size = sum(path.stat().st_size for path in (work / "source").iterdir())
        result = {"layers": arguments.layers, "source_bytes": size, "largest_tensor_bytes": largest}
        # In turns, and a copy at either end: a disk's speed drifts, and other work takes processor time from the conversion.
        copies, conversions = [time_copy(work)], []
        for _ in range(arguments.repeats):
            conversions.append(time_conversion(work, arguments))
            copies.append(time_copy(work))
        seconds = float(np.median([conversion.seconds for conversion in conversions]))
        result |= {
            "bytes_per_second": size / seconds,
            "ceiling_bytes_per_second": size / float(np.mean(copies)),
            "fraction_of_ceiling": float(np.mean(copies)) / seconds,
            "bound": "bytes",
            **describe_timing(summarise_seconds([conversion.seconds for conversion in conversions])),
            "convert_seconds": [conversion.seconds for conversion in conversions],
            "convert_cpu_seconds": [conversion.cpu_seconds for conversion in conversions],
            "copy_seconds": copies,
            "convert_over_copy": seconds / float(np.mean(copies)),
            "convert_gb_per_s": size / 1e9 / seconds,
            "load_average": os.getloadavg()[0],
            "peak_anonymous_bytes": max(conversion.peak_anonymous for conversion in conversions),
            "allowed_anonymous_bytes": int(1.5 * 2**30) + 4 * largest,
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report("convert", result, arguments)


def write_synthetic(directory: Path, layers: int) -> int:
    """Writes a checkpoint of random bfloat16 numbers in shards, straight to files; returns the bytes of the largest tensor."""
    config = dataclasses.replace(MIXTRAL.presets["mixtral_8x7b"], num_layers=layers)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MIXTRAL.config_to_hf(config)))
    shapes = list_sources(config, MIXTRAL.tables[0])
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        if filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][key] = shape
        filled += size
    # Bits of numbers in (-1, 1): noise that neither a disk nor a file system can compress.
    noise = np.random.default_rng(0).integers(0, 1 << 16, 1 << 24, np.uint16) & np.uint16(0xBFFF)
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, name)
        _write_shard(directory / name, shard, noise, number)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    os.sync()
    return max(2 * math.prod(shape) for shape in shapes.values())


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], noise: np.ndarray, seed: int) -> None:
    header, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = offset // 2
        while left:
            first = int(generator.integers(noise.size // 2))
            part = noise[first : first + min(left, noise.size // 2)]
            file.write(part.data)
            left -= part.size


def time_copy(work: Path) -> float:
    """Seconds of `cp -r && sync` of the source."""
    _drop_cache(work / "source")
    started = time.perf_counter()
    subprocess.run(f"cp -r '{work / 'source'}' '{work / 'copy'}' && sync", shell=True, check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(work / "copy")
    return seconds


@dataclass(frozen=True)
class Conversion:
    """One run of the command and a sync after it; anonymous memory, because the pages of files that it reads are not its own."""

    seconds: float
    cpu_seconds: float
    peak_anonymous: int  # bytes


def time_conversion(work: Path, arguments: Arguments) -> Conversion:
    """Runs the command as a user would, and removes what it made."""
    _drop_cache(work / "source")
    command = [sys.executable, "-m", "moejax.checkpoint.convert", str(work / "source"), str(work / "converted")]
    command += ["--dtype", arguments.dtype] if arguments.dtype else []
    command += ["--verify"] if arguments.verify else []
    used = _count_cpu()
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=sys.stderr)
    while process.poll() is None:
        peak = max(peak, read_status(process.pid, "RssAnon") or 0)
        time.sleep(SAMPLED_EVERY)
    os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"the conversion ended with status {process.returncode}; its message stands above")
    shutil.rmtree(work / "converted")
    return Conversion(seconds, _count_cpu() - used, peak)


def _count_cpu() -> float:
    """Seconds of processor time of the processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _drop_cache(directory: Path) -> None:
    """Asks the system to forget the files' pages, so that every measurement reads them from the disk."""
    os.sync()
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
