"""A run that is killed at random moments, also while it saves, is the run that was not: the same losses, the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint import store
from moejax.config import run_from_json
from moejax.model.transformer import Transformer
from moejax.training.state import abstract_state, create_optimizer, stored_part
from tests.conftest import ROOT, run_command

STEPS = 60
CONFIG = '''"""Two layers on three stages."""

from moejax.config import DataConfig, Domain, ModelConfig, RunConfig, Stage, TrainConfig


def config() -> RunConfig:
    """Code with some SQL, then with more and more of it."""
    domains = (Domain("code", "builtin:code"), Domain("sql", "builtin:sql"))
    stages = (Stage(5120, {"code": 4.0, "sql": 1.0}), Stage(5120, {"code": 2.0, "sql": 1.0}), Stage(5120, {"code": 1.0, "sql": 1.0}))
    return RunConfig(
        model=ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=32, num_layers=2, max_length=64, num_experts=4),
        data=DataConfig(domains=domains, stages=stages, sequence_length=64, max_megabytes=0.2),
        train=TrainConfig(batch_size=4, log_every=1, save_every=7, eval_kilobytes=1.0, tensorboard=False),
    )
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "small.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Every command here compiles the same programs; the first one's are kept for the others."""
    cache = tmp_path_factory.mktemp("cache")
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**compiled, "MOEJAX_CACHE": str(cache / "tokens")}


def command(directory: str) -> list[str | Path]:
    return ["python", ROOT / "train.py", "small.py", "--run-dir", directory, "--sample.max-new-tokens", "4"]


@pytest.fixture(scope="module")
def straight(place, environment) -> Path:
    result = run_command(command("straight"), cwd=place, **environment)
    assert result.returncode == 0, result.stderr
    return place / "straight"


def start(place, environment, directory: str) -> subprocess.Popen:
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    variables.pop("JAX_NUMPY_RANK_PROMOTION", None)
    variables.pop("XLA_FLAGS", None)
    words = [sys.executable, *map(str, command(directory)[1:])]
    return subprocess.Popen(words, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop(process: subprocess.Popen, number: int, is_time) -> tuple[str, str]:
    """Sends the signal as soon as `is_time()`; what the process had said."""
    deadline = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.0005)
    process.send_signal(number)
    return process.communicate(timeout=120)


def read_rows(directory: Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_step(directory: Path) -> int:
    return max((row["step"] for row in read_rows(directory)), default=0)


def newest_step(directory: Path) -> int:
    newest = store.latest_step(directory)
    return int(newest.name) if newest else 0


def being_written(directory: Path) -> bool:
    """Whether a checkpoint after the newest whole one has begun to be written."""
    names = [path.name for path in (directory / "checkpoints").glob(".*.tmp-*")]
    return any(int(name.split(".")[1]) > newest_step(directory) for name in names)


def read_losses(directory: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(directory) if "loss" in row]


def final_leaves(directory: Path) -> list[np.ndarray]:
    """Parameters and optimiser's state after the last step."""
    newest = store.step_directory(directory, STEPS)
    metadata = store.read_metadata(newest)
    assert metadata.run is not None and (metadata.rows_read, metadata.random) == (STEPS * 4, {"seed": 0, "step": STEPS})
    target = abstract_state(Transformer(metadata.config), create_optimizer(run_from_json(metadata.run).train))
    params = store.restore_params(newest, metadata.config)
    optimizer = store.restore_optimizer(newest, stored_part(target))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((params, optimizer))]


def assert_same_run(one: Path, other: Path) -> None:
    assert [step for step, *_ in read_losses(one)] == list(range(1, STEPS + 1))
    assert read_losses(one) == read_losses(other)
    for a, b in zip(final_leaves(one), final_leaves(other), strict=True):
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())


@pytest.mark.slow
def test_killed_five_times_it_is_the_run_that_was_not(straight, place, environment):
    directory, generator, inside = place / "killed", random.Random(0), 0
    for kill in range(5):
        begin = newest_step(directory)
        process = start(place, environment, "killed")
        if kill % 2:  # while it saves, and has saved once: some of the work must stay
            stop(process, signal.SIGKILL, lambda begin=begin: newest_step(directory) > begin and being_written(directory))
        else:
            step = begin + generator.randint(3, 16)
            stop(process, signal.SIGKILL, lambda step=step: last_step(directory) >= step)
        assert process.returncode == -signal.SIGKILL
        inside += being_written(directory)
        assert all((path / "moejax.json").exists() for path in store.list_steps(directory, also_incomplete=True))
    assert inside >= 1
    result = run_command(command("killed"), cwd=place, **environment)
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout
    assert_same_run(directory, straight)
    assert [path.name for path in (directory / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_stopped_it_saves_says_so_and_goes_on(straight, place, environment, number):
    name = f"stopped-{int(number)}"
    directory = place / name
    process = start(place, environment, name)
    out, err = stop(process, number, lambda: last_step(directory) >= 10)
    assert (process.returncode, err.split()) == (130, ["interrupted"])
    step = last_step(directory)
    assert f"interrupted; saving step {step}: the same command goes on from there" in out
    newest = store.latest_step(directory)
    assert newest == store.step_directory(directory, step)
    result = run_command(command(name), cwd=place, **environment)
    assert result.returncode == 0, result.stderr
    assert f"resuming {name} at step {step}" in result.stdout
    assert_same_run(directory, straight)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_trained_again(straight, place, environment):
    """The line on the screen, and the same end."""
    directory = place / "damaged"
    shutil.copytree(straight, directory)
    newest = store.step_directory(directory, STEPS)
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    result = run_command(command("damaged"), cwd=place, **environment)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "damaged" in line and line.startswith("checkpoints/")]
    assert len(lines) == 1 and "is truncated" in lines[0] and "going on from checkpoints/00000056" in lines[0]
    assert_same_run(directory, straight)


@pytest.mark.slow
def test_two_at_once(straight, place, environment):
    process = start(place, environment, "together")
    deadline = time.monotonic() + 120
    while last_step(place / "together") < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    second = run_command(command("together"), cwd=place, **environment)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert second.returncode == 2 and second.stderr.count("\n") == 1, second.stderr
    assert f"together is in use: process {process.pid} on" in second.stderr
    assert process.returncode == 0, err
    assert_same_run(place / "together", straight)
