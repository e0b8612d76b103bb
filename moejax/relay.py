"""Passes on what a process writes to its standard error, but for the end of a job whose processes have lost each other: one line of that.

jax's runtime ends a process by itself when another one is gone: some lines of log, a stack of its own functions, and an abort that no
Python code sees. This program reads the process's standard error through a pipe, outlives it, and says in a line what happened. Run as a
script, by its path, with nothing but the standard library.
"""

import re
import signal
import sys
from collections.abc import Iterable, Iterator

ADVICE = "give the same command again in every process, and the job goes on from its last checkpoint"
LOST = f"error: another process of this job has ended or cannot be reached; the line of the first that ended says why. To go on, {ADVICE}"
NEVER_MET = (
    "error: the processes of this job have not all met in time; start as many as --distributed.num-processes says, each with its own "
    "--distributed.process-id and all with the same --distributed.coordinator, or allow more --distributed.timeout"
)
# Lines of the runtime's log, as "E1121 23:12:34.337366   26040 coordination_service_agent.cc:289] ...", that come before the last one.
_FOREBODING = re.compile(r"[IWE]\d{4} \S+ +\d+ \S*(coordination_service|preemption|distributed_runtime|client\.h|client\.cc|grpc)\S*\]")
_CONTINUED = re.compile(r"Additional GRPC error information|:UNKNOWN:|\d+$|The tasks have crashed")
_END = re.compile(r"F\d{4} .*(JAX distributed service detected fatal errors|coordination service)")


def relay(lines: Iterable[str]) -> Iterator[str]:
    """The lines to pass on."""
    for line in lines:
        if _END.match(line):
            yield (NEVER_MET if "DEADLINE_EXCEEDED" in line and "heartbeat" not in line.lower() else LOST) + "\n"
            return
        if not _FOREBODING.match(line) and not _CONTINUED.match(line):
            yield line
            if line.startswith(LOST):  # said by the process itself, before it was ended
                return


def main() -> None:
    """From stdin to stderr, to the end of stdin, whatever signals come."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with open(sys.stdin.fileno(), encoding="utf-8", errors="replace", newline="") as source:
        for line in relay(source):
            sys.stderr.write(line)
            sys.stderr.flush()
        for _ in source:
            pass  # the writer must not be stopped by a pipe that nobody reads


if __name__ == "__main__":
    main()
