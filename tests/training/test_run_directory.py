"""One directory holds one run: what may change when it goes on, and what is refused."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from moejax.config import DataConfig, ModelConfig, RunConfig, TrainConfig, UserError, to_json
from moejax.training.run_directory import claim_run_directory, hold_run_directory


@pytest.fixture
def run(tmp_path) -> RunConfig:
    """A run that has begun: its tokenizer is there."""
    config = RunConfig(run_dir=str(tmp_path / "runs" / "a"), model=ModelConfig(num_layers=2))
    directory = claim_run_directory(config)
    (directory / "tokenizer.model").write_bytes(b"")
    return config


def change(run: RunConfig, section: str, **values) -> RunConfig:
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **values)})


def test_the_configuration_is_kept(run, tmp_path):
    directory = tmp_path / "runs" / "a"
    assert json.loads((directory / "config.json").read_text()) == to_json(run)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "tokenizer.model"]
    assert claim_run_directory(run) == directory


@pytest.mark.parametrize(
    ("section", "values"),
    [("train", {"steps": 7, "optimizer": "muon"}), ("sample", {"temperature": 0.0}), ("model", {"dtype": "bfloat16", "remat": "full"})],
    ids=["train", "sample", "how the model is computed"],
)
def test_a_run_goes_on_with_other_settings(run, section, values):
    changed = change(run, section, **values)
    directory = claim_run_directory(changed)
    assert json.loads((directory / "config.json").read_text()) == to_json(changed)


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        ("model", {"num_experts": 16}, ("model.num_experts was 8 and is now 16",)),
        ("model", {"residual_mlp": False, "num_layers": 3}, ("residual_mlp was True", "num_layers was 2 and is now 3")),
        ("data", {"sequence_length": 128}, ("data.sequence_length was 256 and is now 128",)),
        ("data", {"path": "books"}, ("data.path was None and is now 'books'",)),
    ],
)
def test_another_model_or_other_data_are_refused_by_field(run, section, values, parts):
    before = (claim_run_directory(run) / "config.json").read_text()
    with pytest.raises(UserError) as caught:
        claim_run_directory(change(run, section, **values))
    message = str(caught.value)
    assert [part for part in (run.directory, "--run-dir", *parts) if part not in message] == [], message
    assert "\n" not in message
    assert (claim_run_directory(run) / "config.json").read_text() == before


def test_a_run_that_came_to_nothing_is_no_obstacle(run, tmp_path):
    """A misspelt --data.path must not be held against the corrected one."""
    config = RunConfig(run_dir=str(tmp_path / "b"), data=DataConfig(path="no/such/place"))
    claim_run_directory(config)
    claim_run_directory(dataclasses.replace(config, data=DataConfig(path="books")))


def test_fields_newer_than_the_run_are_no_difference(run):
    path = claim_run_directory(run) / "config.json"
    values = json.loads(path.read_text())
    del values["model"]["scan_layers"], values["data"]["seed"]
    path.write_text(json.dumps(values))
    claim_run_directory(dataclasses.replace(run, train=TrainConfig(steps=5)))


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "mixtral", "hidden_size": 64}'], ids=["cut", "list", "a published model's"])
def test_a_config_that_is_none_of_ours_is_refused_and_kept(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not .*--run-dir"):
        claim_run_directory(RunConfig(run_dir=str(tmp_path)))
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("place", ["/proc/runs/a", "/dev/null/a"])
def test_a_place_that_cannot_be_written_to_is_refused(place):
    with pytest.raises(UserError, match=rf"cannot write the run directory {place}: .*--run-dir"):
        claim_run_directory(RunConfig(run_dir=place))


# -- one process at a time ------------------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from moejax.config import RunConfig
from moejax.training.run_directory import hold_run_directory
with hold_run_directory(RunConfig(run_dir=sys.argv[1])):
    child = os.fork()  # as a worker that outlives it
    if not child:
        print(os.getpid(), flush=True)
        os.close(1)
    time.sleep(60)
"""


def test_a_run_is_trained_by_one_process_until_it_ends_or_is_killed(tmp_path):
    config = RunConfig(run_dir=str(tmp_path / "runs" / "a"))
    with subprocess.Popen([sys.executable, "-c", HOLDER, config.directory], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            message = rf"runs/a is in use: process {process.pid} on {socket.gethostname()} is training there; .*--run-dir"
            for _ in range(2):
                with pytest.raises(UserError, match=message), hold_run_directory(config):
                    raise AssertionError("two processes in one directory")
            process.send_signal(signal.SIGKILL)
            process.wait()
            with hold_run_directory(config):
                pass
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def test_a_run_is_trained_once_in_a_process_too(tmp_path):
    config = RunConfig(run_dir=str(tmp_path))
    with hold_run_directory(config), pytest.raises(UserError, match=f"process {os.getpid()} on"), hold_run_directory(config):
        raise AssertionError("two runs in one directory")
    with hold_run_directory(config):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_where_there_are_no_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lines = []
    with hold_run_directory(RunConfig(run_dir=str(tmp_path)), lines.append):
        assert len(lines) == 1 and "cannot be locked (" in lines[0]


def test_a_place_that_cannot_be_held_is_refused():
    with (
        pytest.raises(UserError, match="cannot write the run directory /proc/runs/a"),
        hold_run_directory(RunConfig(run_dir="/proc/runs/a")),
    ):
        raise AssertionError("it was held")
