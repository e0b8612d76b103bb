"""What compiled code says on standard error is kept, and standard error is as it was afterwards."""

import os
import subprocess

import pytest

from moejax.planning.messages import captured_stderr


def test_what_is_written_to_the_descriptor_is_kept(capfd):
    with captured_stderr() as messages:
        os.write(2, b"from below\n")
        subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
        assert messages == []
    assert messages == ["from below\nfrom a child\n"]
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_standard_error_comes_back_after_an_error(capfd):
    with pytest.raises(KeyboardInterrupt), captured_stderr() as messages:
        os.write(2, b"said before it failed\n")
        raise KeyboardInterrupt
    assert messages == ["said before it failed\n"]
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_no_descriptor_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with captured_stderr():
            pass
    assert len(os.listdir("/proc/self/fd")) == before
