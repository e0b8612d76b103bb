"""moejax-data prepare: it makes what train.py looks for, goes on where it was stopped, and answers mistakes with one line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from moejax.data.cache import INDEX, PROGRESS
from tests.conftest import ROOT, run_command

COMMAND = ["python", "-m", "moejax.data.prepare_command"]
CONFIG = """from moejax.config import *

def config():
    return RunConfig(model=ModelConfig(vocab_size=512), data=DataConfig(domains=(Domain("mine", "text.jsonl"),)))
"""


@pytest.fixture
def place(tmp_path):
    """A config, and text enough for a second or two of work by worker processes."""
    (tmp_path / "config.py").write_text(CONFIG)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randrange(2, 9))) for _ in range(3000)]
    with (tmp_path / "text.jsonl").open("w") as file:
        for _ in range(300):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=500))}) + "\n")
    return tmp_path


def prepare(place, *flags, **environment):
    return run_command([*COMMAND, "prepare", "config.py", *flags], cwd=place, MOEJAX_CACHE=str(place / "cache"), **environment)


def entries(place):
    return [path for path in (place / "cache").iterdir() if path.is_dir() and not path.name.startswith("tokenizer-")]


def test_what_is_prepared_is_found_by_a_run(place):
    result = prepare(place, "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert "mine: 0." in result.stdout and "ready to train: python train.py config.py" in result.stdout
    assert not (place / "runs").exists()  # a run that is not begun claims nothing
    again = prepare(place, "--workers=1")
    assert again.returncode == 0 and "M tokens kept in" in again.stdout
    code = (
        "from moejax.data.prepare import prepare; from moejax.cli import load_config; from pathlib import Path; "
        "config, _ = load_config(Path('config.py'), Path()); print(len(prepare(config.data, 512, 'run').rows['mine']))"
    )
    (place / "run").mkdir()
    run = run_command(["python", "-c", code], cwd=place, MOEJAX_CACHE=str(place / "cache"))
    assert run.returncode == 0, run.stderr
    assert "kept in" in run.stdout and len(entries(place)) == 1


@pytest.mark.parametrize(
    "words, parts",
    [
        ([], ["got the command nothing", "moejax-data prepare CONFIG.py"]),
        (["prepair", "config.py"], ["'prepair'", "expected prepare"]),
        (["prepare", "nothing.py"], ["nothing.py"]),
        (["prepare", "config.py", "--wrkers", "2"], ["unknown flag --wrkers"]),
        (["prepare", "config.py", "--data.path", "gone"], ["'gone' does not exist"]),
        (["prepare", "config.py", "--init-from", "."], ["no tokenizer found in init_from='.'"]),
    ],
)
def test_mistakes_are_one_line(place, words, parts):
    result = run_command([*COMMAND, *words], cwd=place, MOEJAX_CACHE=str(place / "cache"))
    assert (result.returncode, result.stdout) == (2, ""), result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert [part for part in parts if part not in result.stderr] == [], result.stderr


def test_a_disk_that_fills_is_one_line_and_leaves_nothing(place):
    """No file may grow above 100 KB: more than the tokenizer, less than the tokens."""
    assert prepare(place).returncode == 0
    (entry,) = entries(place)
    size = (entry / "ids.bin").stat().st_size
    assert size > 200_000
    for path in [*entry.iterdir(), entry]:
        path.rmdir() if path.is_dir() else path.unlink()
    words = ["bash", "-c", 'ulimit -f 98; exec "$@"', "bash", sys.executable, *COMMAND[1:], "prepare", "config.py"]
    environment = {**os.environ, "MOEJAX_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}
    limited = subprocess.run(words, cwd=place, env=environment, text=True, capture_output=True, check=False)
    assert limited.returncode == 2, limited.stderr
    assert limited.stderr.startswith("error: no room for tokens in") and limited.stderr.count("\n") == 1, limited.stderr
    assert "--data.cache-dir" in limited.stderr
    assert entries(place) == []
    assert prepare(place).returncode == 0


SMALL_STEPS = """
import sys
from moejax.data import cache_writer, held_out, prepare, prepare_command
cache_writer.COMMIT_BYTES, held_out.HEAD, prepare.HEAD, prepare.PART = 100_000, 50_000, 50_000, 20_000
prepare_command.run(sys.argv[1:])
"""


def start(place, *flags):
    """The command with steps so small that it can be met in its midst."""
    environment = {**os.environ, "MOEJAX_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_STEPS, "prepare", "config.py", "--workers", "2", *flags], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(place, name):
    deadline = time.monotonic() + 60
    while not list(place.glob(f"cache/*/{name}")):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_command_that_is_stopped_goes_on_where_it_was(place, number):
    with start(place) as process:
        wait_for(place, PROGRESS)
        process.send_signal(number)
        process.communicate(timeout=30)
    (entry,) = entries(place)
    assert not (entry / INDEX).exists()
    with start(place) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "mine: going on behind 0." in out
    with start(place, "--data.cache-dir", "fresh") as process:
        assert process.communicate(timeout=60) and process.returncode == 0
    for path in entry.iterdir():
        assert path.read_bytes() == (place / "fresh" / entry.name / path.name).read_bytes(), path.name
    with start(place) as process:
        assert "kept in" in process.communicate(timeout=60)[0]


def test_two_commands_at_once_make_one_entry(place):
    with start(place) as first, start(place) as second:
        results = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], results
    assert len(entries(place)) == 1
    outs = sorted((out for out, _ in results), key=lambda out: "kept in" in out)
    assert "kept in" not in outs[0] and "M tokens kept in" in outs[1]
    again = prepare(place)
    assert "kept in" in again.stdout and "broken" not in again.stdout
