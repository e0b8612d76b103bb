"""Several processes train as one: the same losses, checkpoints for any number of them, and an end within bounds when one is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax import distributed, relay
from moejax.checkpoint import store
from moejax.config import DistributedConfig, UserError
from moejax.distributed import find_cluster, is_lost_process, join_processes
from tests.conftest import ROOT, SHORT_RUN, write_text

STEPS = 12
OPTIONS = [
    *SHORT_RUN,
    *("--train.log-every", "1", "--train.save-every", "4", "--train.keep-checkpoints", "9", "--train.batch-size", "8"),
    *("--no-train.tensorboard", "--model.num-layers", "2", "--data.sequence-length", "64", "--sample.max-new-tokens", "4"),
    *("--mesh.fsdp", "2", "--mesh.expert", "2"),
]
DEVICES = 4


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Job:
    """train.py in `count` processes that have four simulated devices together; standard output and error of each."""

    def __init__(self, place: Path, count: int, directory: str, *options: str, steps: int = STEPS) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "JAX_NUMPY_RANK_PROMOTION"}
        flags = f"--xla_force_host_platform_device_count={DEVICES // count} --xla_backend_optimization_level=0"  # most of it is compiling
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(place / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, str(ROOT / "train.py"), "--run-dir", directory, "--train.steps", str(steps), *OPTIONS, *options]
        meeting = ["--distributed.coordinator", f"localhost:{free_port()}", "--distributed.num-processes", str(count)]
        self.directory, self.logs = place / directory, [place / f"{directory}.{number}.{count}.txt" for number in range(count)]
        self.processes = []
        for number, log in enumerate(self.logs):
            place_of_process = [*meeting, "--distributed.process-id", str(number)] if count > 1 else []
            with log.open("w") as file:
                started = subprocess.Popen([*command, *place_of_process], cwd=place, env=environment, stdout=file, stderr=subprocess.STDOUT)
            self.processes.append(started)

    def wait(self, seconds: float = 240) -> list[int]:
        """The status of each process; what is left of them after some time is killed."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while f"step {step}/" not in self.logs[0].read_text():
            assert time.monotonic() < end and all(process.poll() is None for process in self.processes), self.say()
            time.sleep(0.05)

    def say(self) -> str:
        return "\n".join(f"-- {log.name}\n{log.read_text()[-2000:]}" for log in self.logs)

    def lines(self, number: int) -> list[str]:
        """What a process said, but for the compiler's log."""
        return [line for line in self.logs[number].read_text().splitlines() if line and "spmd_partitioner" not in line]


def finish(job: Job) -> Path:
    assert set(job.wait()) == {0}, job.say()
    return job.directory


def read_losses(directory: Path) -> dict[int, float]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def read_evaluation(directory: Path) -> float:
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["eval_bits_per_byte"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def straight(place) -> Path:
    """The run of one process, from start to end."""
    return finish(Job(place, 1, "straight"))


@pytest.fixture(scope="module")
def four(place, straight) -> Path:
    """The same run by four processes."""
    job = Job(place, 4, "four")
    finish(job)
    assert all(job.lines(number) == [] for number in (1, 2, 3))
    return job.directory


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_processes_train_as_one(four, straight):
    expected = read_losses(straight)
    assert list(expected) == list(range(1, STEPS + 1)) and expected[STEPS] < 0.8 * expected[1]
    assert read_losses(four) == pytest.approx(expected, rel=1e-4)
    assert read_evaluation(four) == pytest.approx(read_evaluation(straight), rel=1e-4)
    assert json.loads((four / "config.json").read_text())["distributed"]["num_processes"] == 4


@pytest.mark.slow
def test_what_four_have_saved_one_goes_on_from(place, four, straight):
    go_on_from(four, place / "one", 8)
    assert read_losses(finish(Job(place, 1, "one"))) == pytest.approx(read_losses(straight), rel=1e-4)


def go_on_from(source: Path, target: Path, step: int) -> None:
    """A run as it was at a checkpoint of another one."""
    shutil.copytree(source, target)
    for checkpoint in store.list_steps(target):
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.slow
def test_two_go_on_and_are_killed_and_go_on(place, four, straight):
    go_on_from(four, place / "two", 4)
    job = Job(place, 2, "two", "--train.save-every", "2")
    job.wait_for_step(7)
    assert [line for line in job.lines(0) if line.startswith("resuming")] == ["resuming two at step 4"]
    job.processes[1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    status = job.wait(60)
    assert status[0] in (distributed.EXIT_LOST_PROCESS, -signal.SIGABRT) and status[1] == -signal.SIGKILL, job.say()
    assert time.monotonic() - started < 60
    assert job.lines(0)[-1] == relay.LOST
    assert sum(line.startswith(("error", "Traceback")) for line in job.lines(0)) == 1

    again = Job(place, 2, "two")
    assert read_losses(finish(again)) == pytest.approx(read_losses(straight), rel=1e-4)
    assert any(line.startswith("resuming two at step") for line in again.lines(0))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(place, four):
    go_on_from(four, place / "stopped", 12)
    job = Job(place, 2, "stopped", steps=5000)
    job.wait_for_step(14)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait(60) == [130, 130], job.say()
    newest = store.latest_step(job.directory)
    assert newest is not None
    assert f"interrupted; saving step {int(newest.name)}: the same command goes on from there" in job.lines(0)
    assert job.lines(1) == []
    store.verify(newest)


# -- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # a shell within an allocation: no step of it runs
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-8]"}, "SLURM_NTASKS"),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "x"}, "OMPI_COMM_WORLD_SIZE"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}, "TPU_WORKER_HOSTNAMES"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_what_the_environment_says(environment, expected):
    assert find_cluster({"TPU_SKIP_MDS_QUERY": "1", **environment}) == expected


def test_the_hosts_of_a_tpu_are_asked_for(monkeypatch):
    monkeypatch.setattr(distributed, "_has_tpu", lambda: True)
    for answer, expected in (("10.0.0.1", None), ("a:b:10.0.0.1,a:b:10.0.0.2", "the metadata server"), ("", None)):
        monkeypatch.setattr(distributed, "_ask_metadata", lambda answer=answer: answer)
        assert find_cluster({}) == expected


def test_a_coordinator_out_of_reach_is_named():
    address = f"localhost:{free_port()}"
    with pytest.raises(UserError, match=rf"distributed.coordinator='{address}' could not be reached within 1 s \(Connection refused\)"):
        join_processes(DistributedConfig(address, 1, 2, timeout=1))


def test_a_process_alone_joins_nobody_and_loses_nobody(monkeypatch):
    monkeypatch.setattr(distributed, "find_cluster", lambda environment: None)
    join_processes(DistributedConfig())
    assert distributed.is_first()
    assert not is_lost_process(RuntimeError("Gloo all-reduce failed: Connection closed by peer"))
    with pytest.raises(UserError, match="wrong"), distributed.ending_together():
        raise UserError("wrong")


def test_errors_of_a_lost_process_are_known(monkeypatch):
    monkeypatch.setattr(distributed, "_name_process", lambda: (0, 2))
    lost = ValueError("UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:14753")
    assert is_lost_process(lost)
    assert not is_lost_process(UserError("the barrier of the harbour: connection closed"))
    assert not is_lost_process(KeyError("gloo"))
    try:
        raise UserError("its arrays cannot be read") from lost
    except UserError as error:
        assert is_lost_process(error)
