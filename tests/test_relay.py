"""What is passed on of a process's standard error, and the one line that stands for the end of a job."""

import subprocess
import sys

from moejax import relay

AGENT = (
    "E1121 23:12:34.337366   26040 coordination_service_agent.cc:289] Polled an error from coordination service (this can be an error).\n"
)
END = (
    "F1121 23:12:34.337371   26040 client.h:80] Terminating process because the JAX distributed service detected fatal errors. This most "
    "likely indicates that another task died. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service.\n"
)
STACK = ["*** Check failure stack trace: ***\n", "    @     0x7f7abe240634  absl::lts_20260107::log_internal::LogMessage::SendToLog()\n"]
OTHER = ["W1121 23:12:34.337371   26040 spmd_partitioner.cc:656] something to know\n", "a line of Python\n"]


def test_the_runtime_s_end_is_one_line():
    assert list(
        relay.relay([*OTHER, AGENT, ":UNKNOWN:Error received from peer\n", "1\n", "The tasks have crashed. Check\n", END, *STACK])
    ) == [*OTHER, relay.LOST + "\n"]


def test_processes_that_never_met_are_told_apart():
    assert list(relay.relay([END.replace("UNAVAILABLE", "DEADLINE_EXCEEDED"), *STACK])) == [relay.NEVER_MET + "\n"]
    assert list(relay.relay([END.replace("UNAVAILABLE: Failed", "DEADLINE_EXCEEDED: heartbeat"), *STACK])) == [relay.LOST + "\n"]


def test_a_process_that_has_said_it_is_not_repeated():
    assert list(relay.relay([relay.LOST + "\n", END, *STACK])) == [relay.LOST + "\n"]


def test_the_script_outlives_nobody_and_passes_everything_else_on():
    text = "".join(OTHER) + "half a line"
    result = subprocess.run(
        [sys.executable, "-I", "-S", str(relay.__file__)], input=text, capture_output=True, text=True, timeout=60, check=True
    )
    assert (result.stderr, result.stdout) == (text, "")
