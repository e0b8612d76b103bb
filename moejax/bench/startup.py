"""Startup: seconds from the command to the first training step done, with an empty folder of compiled programs and with it filled.

Runs `train.py` as a user would, on text and a tokenizer that are in the cache already, and stops it after a few steps. Cold finds no
compiled program, warm those of the cold run before it. Beside them what a process takes that only imports jax and adds eight numbers.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moejax.bench import train
from moejax.bench.measure import describe_shape, describe_timing, summarise_seconds
from moejax.bench.output import report
from moejax.bench.shape import PEER_BATCH, SHAPE_FIELDS, hold_to_peer_shape
from moejax.config import DataConfig, RunConfig, TrainConfig, UserError, to_json
from moejax.training.hardware import read_status

STEPS = 3  # taken by each run: the first step's memory is not the most
LONGEST = 600.0  # seconds that a run may take
POLLED_EVERY = 0.005  # seconds
SMALLEST_PROGRAM = "import jax; jax.numpy.ones(8).sum().block_until_ready()"
COLUMNS = ("seconds", "seconds_lowest", "seconds_highest", "peak_resident_bytes")


@dataclass(frozen=True)
class Arguments(train.Arguments):
    """Times the way from the command to the first step."""

    repeats: int = 3


@dataclass(frozen=True)
class Start:
    """One run of the command."""

    seconds: float
    peak_resident_bytes: int


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    arguments = hold_to_peer_shape(arguments, batch_size=PEER_BATCH[0], sequence_length=PEER_BATCH[1])
    script = find_script()
    starts: dict[str, list[Start]] = {"warm": [], "cold": []}
    smallest = []
    with tempfile.TemporaryDirectory(prefix="moejax-bench-", ignore_cleanup_errors=True) as folder:
        config = prepare_run(arguments, Path(folder))
        for number in range(arguments.repeats):
            smallest.append(time_smallest_program())
            programs = Path(folder, f"programs-{number}")
            for kind in ("cold", "warm"):
                starts[kind].append(time_start(script, config, Path(folder, f"{kind}-{number}"), programs))
            shutil.rmtree(programs, ignore_errors=True)
    rows = [
        {
            "name": kind,
            **describe_timing(summarise_seconds([start.seconds for start in found])),
            "peak_resident_bytes": max(start.peak_resident_bytes for start in found),
        }
        for kind, found in starts.items()
    ]
    result = {
        "smallest_program_seconds": summarise_seconds(smallest).median,
        "cold_seconds": rows[1]["seconds"],
        "compile_seconds": rows[1]["seconds"] - rows[0]["seconds"],  # what the kept programs spare
        "batch_size": arguments.batch_size,
        "sequence_length": arguments.sequence_length,
        **describe_shape(arguments.model, SHAPE_FIELDS),
        "rows": rows,
    }
    report("startup", result, arguments, COLUMNS)


def find_script() -> Path:
    """The train.py beside the package. Raises UserError where the package was installed without it."""
    script = Path(__file__).resolve().parents[2] / "train.py"
    if not script.is_file():
        raise UserError(f"startup runs train.py, which is not at {script}; run it in a checkout installed with `pip install -e .`")
    return script


def prepare_run(arguments: Arguments, folder: Path) -> Path:
    """Text, tokens and a config file in `folder`; the path of that. Raises UserError for sizes that are no run's."""
    from moejax.bench.data import make_text
    from moejax.data.prepare import prepare

    text = folder / "text"
    text.mkdir()
    (text / "text.txt").write_text("\n".join(make_text(1.0)), encoding="utf-8")
    config = RunConfig(
        model=replace(arguments.model, max_length=max(arguments.model.max_length, arguments.sequence_length)),
        data=DataConfig(domains=(), path=str(text), cache_dir=str(folder / "tokens"), sequence_length=arguments.sequence_length),
        train=TrainConfig(steps=STEPS, batch_size=arguments.batch_size, eval_kilobytes=1.0),
    )
    prepare(config.data, config.model.vocab_size, folder / "preparing", lambda line: None)
    path = folder / "startup_config.py"
    path.write_text(
        '"""A few steps, to see how soon the first one is done."""\n\nfrom moejax.config import run_from_json\n\n\n'
        f"def config():\n    return run_from_json({to_json(config)!r})\n"
    )
    return path


def time_smallest_program() -> float:
    """Seconds of a Python process that imports jax and uses it once."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", SMALLEST_PROGRAM], check=True, capture_output=True)
    return time.perf_counter() - started


def time_start(script: Path, config: Path, directory: Path, programs: Path) -> Start:
    """Runs the command until its last step is taken. Raises UserError, with its last words, where it ends before."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(programs), "MOEJAX_CACHE": str(programs / "moejax")}
    environment.pop("GLIBC_TUNABLES", None)  # the benchmark itself was begun again with large pages; a user's command has yet to
    log = directory.with_suffix(".log")
    with log.open("wb") as file:
        started, first, peak = time.perf_counter(), 0.0, 0
        process = subprocess.Popen(
            [sys.executable, str(script), str(config), "--run-dir", str(directory)], stdout=file, stderr=file, env=environment
        )
        try:
            for rows, resident in _watch(process, directory / "metrics.jsonl", started):
                first = first or (time.perf_counter() - started if rows else 0.0)
                peak = max(peak, resident)
                if rows > 1:  # the first step's and the last one's
                    break
        finally:
            process.kill()
            process.wait()
    if not first:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        seconds = time.perf_counter() - started
        raise UserError(f"{script.name} ended before its first step, or was stopped, after {seconds:.0f} s; its last words: {lines[-1]}")
    shutil.rmtree(directory, ignore_errors=True)
    return Start(first, peak)


def _watch(process: subprocess.Popen, metrics: Path, started: float) -> Iterator[tuple[int, int]]:
    """(rows of metrics.jsonl, peak resident bytes so far), again and again until the process ends or takes too long."""
    while process.poll() is None and time.perf_counter() - started < LONGEST:
        rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        yield rows, read_status(process.pid, "VmHWM") or 0
        time.sleep(POLLED_EVERY)
    yield (metrics.read_bytes().count(b"\n") if metrics.exists() else 0), 0
