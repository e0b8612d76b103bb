"""Several processes that train one model: how they meet, before any device is touched, and how they end together.

What they do together while training is in checkpoint/processes.py (barriers, saving) and training/interruption.py (stopping).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from moejax import relay
from moejax.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, AtOnce
from moejax.config import DistributedConfig, UserError

EXIT_LOST_PROCESS = 75  # EX_TEMPFAIL of sysexits.h: start it again
HEARTBEAT_SECONDS = 30  # without a sign of life after which a process counts as gone
PARTING_SECONDS = 120  # for the first process to finish what it alone does at the end
_GCE_ENDPOINTS = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket closed|broken pipe|UNAVAILABLE|DEADLINE_EXCEEDED|barrier|"
    r"coordination service|heartbeat",
    re.IGNORECASE,
)


def join_processes(config: DistributedConfig) -> None:
    """Joins this process to the others of its job; returns at once where it is alone. To be called before jax touches a device.

    The flags of `config` count before the environment. Raises UserError, naming the coordinator, where it cannot be reached in
    config.timeout seconds.
    """
    if config.coordinator is None and find_cluster(os.environ) is None:
        return
    if config.num_processes == 1:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is training/interruption.py's
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    waits: dict[str, Any] = {"initialization_timeout": config.timeout}
    waits |= {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": PARTING_SECONDS}
    if config.coordinator is not None:
        if config.process_id != 0:
            _wait_for_coordinator(config.coordinator, config.timeout)
        waits |= {"cluster_detection_method": "deactivate"}
    _start_relay()
    _take_stdout()
    try:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id, **waits)
    except (RuntimeError, ValueError, OSError) as error:
        where = config.coordinator or f"the coordinator that {find_cluster(os.environ)} names"
        raise UserError(f"cannot join the other processes at {where}: {str(error).splitlines()[0]}") from error


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """The variable (or service) that says that this process is one of several; None where nothing does.

    Those that jax.distributed.initialize reads by itself: its own, Slurm's, Open MPI's, those of Cloud TPU and GKE.
    """
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return "JAX_COORDINATOR_ADDRESS"
    counted = ("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"), "OMPI_COMM_WORLD_SIZE"
    needed = {"SLURM": "SLURM_STEP_NODELIST", "OMPI": "OMPI_MCA_orte_hnp_uri"}  # a shell within an allocation has the count alone
    for name in counted:
        if needed[name.partition("_")[0]] in environment and _count(environment.get(name)) > 1:
            return name
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in environment.get(name, ""):
            return name
    if _count(environment.get("MEGASCALE_NUM_SLICES")) > 1:
        return "MEGASCALE_NUM_SLICES"
    return "the metadata server" if "TPU_SKIP_MDS_QUERY" not in environment and _has_tpu() and "," in _ask_metadata() else None


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _has_tpu() -> bool:
    return any(Path("/dev").glob("accel*")) or (Path("/dev/vfio/0").exists() and not any(Path("/dev").glob("nvidia*")))


def _ask_metadata() -> str:
    """The endpoints of a Cloud TPU's hosts, with commas between them; nothing where nobody answers."""
    import urllib.request

    try:
        request = urllib.request.Request(_GCE_ENDPOINTS, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return ""


def _wait_for_coordinator(address: str, seconds: float) -> None:
    """Returns when somebody listens there. jax would end the process with a stack of its own after the same time."""
    host, _, port = address.rpartition(":")
    end, reason = time.monotonic() + seconds, ""
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(min(end - time.monotonic(), 10.0), 0.1)):
                return
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if time.monotonic() >= end:
            raise UserError(
                f"distributed.coordinator={address!r} could not be reached within {seconds:g} s ({reason}); start process 0 there, open "
                "the port between the hosts, or allow more --distributed.timeout"
            )
        time.sleep(min(0.5, max(end - time.monotonic(), 0.0)))


def _start_relay() -> None:
    """From now on, what this process writes to standard error goes through moejax/relay.py."""
    sys.stderr.flush()
    started = subprocess.Popen([sys.executable, "-I", "-S", str(Path(relay.__file__))], stdin=subprocess.PIPE, start_new_session=True)
    assert started.stdin is not None
    os.dup2(started.stdin.fileno(), 2)
    started.stdin.close()
    started.returncode = 0  # it outlives this process: nobody waits for it, nor warns of it


def _take_stdout() -> None:
    """Keeps standard output to what Python prints: Gloo writes a line to it for every group of processes that it connects."""
    sys.stdout.flush()
    ours = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = open(ours, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def is_first() -> bool:
    """Whether this process speaks for the job: the only one, or the first of several."""
    return _name_process()[0] == 0


def _name_process() -> tuple[int, int]:
    """(number, how many), touching no device of a process that is alone."""
    import jax

    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within it, whatever ends one of several processes ends it without waiting for the others, which then end as well.

    An error is told with the process's number; a process that is lost, in one line, with status 75. A process alone is left alone.
    """
    try:
        yield
    except BaseException as error:
        if _name_process()[1] == 1:
            raise
        _end(error)
    if _name_process()[1] > 1:
        _part()


def _end(error: BaseException) -> NoReturn:
    number, count = _name_process()
    if is_lost_process(error):
        _exit(EXIT_LOST_PROCESS, relay.LOST)
    if isinstance(error, UserError):
        _exit(EXIT_USER_ERROR, f"error: process {number} of {count}: {error}")
    if isinstance(error, KeyboardInterrupt):
        if not isinstance(error, AtOnce):
            with contextlib.suppress(Exception):
                _part()
        _exit(EXIT_INTERRUPTED, "\ninterrupted" if number == 0 else None)
    if isinstance(error, SystemExit):
        _exit(error.code if isinstance(error.code, int) else int(error.code is not None), None)
    traceback.print_exception(error)
    _exit(1, f"process {number} of {count} has failed")


def _part() -> None:
    """Returns when all processes are here; nobody misses one that ends after this."""
    import jax

    jax.distributed.shutdown()


def _exit(status: int, line: str | None) -> NoReturn:
    """Ends this process now: its interpreter would first wait for the others, at least one of which does not come."""
    with contextlib.suppress(OSError, ValueError):
        if line is not None:
            print(line, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says, or was raised because of one that says, that another process does not answer any more."""
    seen: BaseException | None = error
    while seen is not None:
        # jaxlib raises plain ValueError and RuntimeError too; a sentence of ours may speak of a barrier.
        if isinstance(seen, (RuntimeError, ValueError)) and not isinstance(seen, UserError) and _LOST.search(str(seen)):
            return _name_process()[1] > 1
        seen = seen.__cause__
    return False
