"""The benchmark of startup: it sees the first step when it is done, stops the run, and says why one did not come so far."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from moejax.bench import startup
from moejax.config import UserError
from moejax.training import hardware
from tests.bench.conftest import SMALL

# A script in the place of train.py: as it is called, with metrics.jsonl as a run writes it.
SCRIPT = """
import os, pathlib, sys, time
print("began", flush=True)
config, _, directory = sys.argv[1:]
pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).mkdir(exist_ok=True)
pathlib.Path(directory).mkdir()
pathlib.Path(directory).with_suffix(".pid").write_text(str(os.getpid()))
if config.endswith("broken.py"):
    sys.exit("error: no such luck")
memory = bytearray(60_000_000)
for _ in range(2):
    time.sleep(0.3)
    with open(directory + "/metrics.jsonl", "a") as file:
        file.write("{}\\n")
time.sleep(60)
"""


def test_the_first_row_ends_the_time_and_the_last_one_the_run(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    start = startup.time_start(script, tmp_path / "config.py", tmp_path / "run", tmp_path / "programs")
    assert 0.3 < start.seconds < 30
    assert start.peak_resident_bytes == 0 or start.peak_resident_bytes > 60_000_000  # 0 where the system does not tell
    assert (tmp_path / "programs").is_dir() and not (tmp_path / "run").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "run.pid").read_text()), 0)


def test_a_run_that_ends_before_says_its_last_words(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with pytest.raises(UserError, match=r"ended before its first step, .*; its last words: error: no such luck"):
        startup.time_start(script, tmp_path / "broken.py", tmp_path / "run", tmp_path / "programs")


def test_it_runs_the_script_of_this_checkout():
    assert startup.find_script().name == "train.py"
    assert hardware.read_status(2**22 + 1, "VmHWM") is None  # a number that no process has


@pytest.mark.slow
def test_a_start(capsys):
    startup.run(startup.Arguments(model=dataclasses.replace(SMALL, vocab_size=512), batch_size=2, sequence_length=32, repeats=1, json="-"))
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["warm", "cold"]
    assert result["seconds"] == result["rows"][0]["seconds"] > result["smallest_program_seconds"] > 0
    assert result["cold_seconds"] == result["rows"][1]["seconds"] > 0 and result["peak_resident_bytes"] > 1e8
