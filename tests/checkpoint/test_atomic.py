"""A directory is complete or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from moejax.checkpoint.atomic import remove_directory, remove_leftovers, write_directory
from moejax.config import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def dead_process():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_it_appears_when_complete(tmp_path):
    with write_directory(tmp_path / "deep" / "a", 10) as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "deep" / "a").exists()
    assert names(tmp_path / "deep") == ["a"]
    assert (tmp_path / "deep" / "a" / "x").read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_failure_leaves_the_old_one(tmp_path, error):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    with pytest.raises(type(error)), write_directory(tmp_path / "a", 10) as temporary:
        (temporary / "x").write_text("new")
        raise error
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


def test_replacing(tmp_path):
    for text in ("old", "new"):
        with write_directory(tmp_path / "a", 10) as temporary:
            (temporary / "x").write_text(text)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_so(tmp_path, number):
    with pytest.raises(UserError, match=r"no room to save .*/a: it needs 10 bytes"), write_directory(tmp_path / "a", 10):
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("a library's own words") from error
    assert names(tmp_path) == []


def test_room_is_looked_for_before_writing(tmp_path):
    with (
        pytest.raises(UserError, match=r"it needs 1,000,000,000,000,000,000 bytes, [\d,]+ are free"),
        write_directory(tmp_path / "a", 10**18),
    ):
        raise AssertionError("nothing may be written")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot save"), write_directory(tmp_path / "file" / "a", 10):
        raise AssertionError("nothing may be written")


def test_leftovers_of_dead_processes_are_cleared(tmp_path, dead_process):
    host = socket.gethostname()
    for name in (
        f".a.tmp-{host}-{dead_process}",
        f".b.old-{host}-{dead_process}",
        f".c.old-{host}-{dead_process}",
        f".d.doomed-{host}-{dead_process}",
        f".e.tmp-{host}-{os.getpid()}",
        f".f.tmp-otherhost-{dead_process}",
        ".git",
        "c",
    ):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    # b was moved aside for a replacement that never came: it is the last good one, and returns.
    assert names(tmp_path) == sorted([f".e.tmp-{host}-{os.getpid()}", f".f.tmp-otherhost-{dead_process}", ".git", "b", "c"])


def test_killed_while_writing(tmp_path):
    code = f"""
import os, signal, pathlib
from moejax.checkpoint.atomic import write_directory
with write_directory(pathlib.Path({str(tmp_path / "a")!r}), 10) as temporary:
    (temporary / "x").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    with write_directory(tmp_path / "a", 10) as temporary:
        (temporary / "x").write_text("2")
    assert names(tmp_path) == ["a"]


def test_removing(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_directory(tmp_path / "a")
    assert names(tmp_path) == []
