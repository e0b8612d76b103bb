"""A file is what was there before or what was written, never a part of it; and its checksum is zlib's."""

import os
import zlib

import pytest

from moejax import files
from moejax.files import FULL_DISK_ERRORS, READ_BYTES, measure_file, write_file
from tests.conftest import run_command


@pytest.mark.parametrize(("content", "expected"), [("ä\n\r\n", b"\xc3\xa4\n\r\n"), (b"\x00\xff", b"\x00\xff"), ("", b"")])
@pytest.mark.parametrize("sync", [False, True])
def test_what_is_written_is_all_there_is(tmp_path, content, expected, sync):
    path = tmp_path / "a.json"
    for before in (None, b"something longer that was there before"):
        if before is not None:
            path.write_bytes(before)
        write_file(path, content, sync)
        assert path.read_bytes() == expected
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", FULL_DISK_ERRORS)
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, number, function):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_file(path, "new", sync=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_file_that_vouches_for_others_waits_for_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    write_file(tmp_path / "a", "x")
    assert synced == []
    write_file(tmp_path / "a", "x", sync=True)
    assert len(synced) == 1


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """Written past a limit on the size of files, which the system refuses in the middle of a write."""
    code = (
        "import pathlib, resource, signal\nfrom moejax.files import FULL_DISK_ERRORS, write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try:\n    write_file(pathlib.Path({str(tmp_path / 'a')!r}), 'x' * 10_000)\n"
        "except OSError as error:\n    print(error.errno in FULL_DISK_ERRORS)\n"
    )
    (tmp_path / "a").write_text("old")
    result = run_command(["python", "-c", code])
    assert (result.stdout, result.stderr) == ("True\n", "")
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_place_that_is_none_is_told_as_what_it_is(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write_file(tmp_path / "file" / "a.json", "x")
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "nothing" / "a.json", "x")


@pytest.mark.parametrize("size", [0, 1, READ_BYTES - 1, READ_BYTES, 2 * READ_BYTES + 3])
def test_checksums_are_those_of_zlib(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    assert measure_file(tmp_path / "x") == (size, zlib.crc32(data))
