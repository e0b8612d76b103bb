"""What a killed conversion leaves is read to its last whole line; progress says rate and time left."""

from __future__ import annotations

import io

import pytest

from moejax.checkpoint.manifest import FileSum
from moejax.checkpoint.transfer import Busy, Journal, Progress


def test_a_journal_is_read_to_its_last_whole_line(tmp_path):
    path = tmp_path / "journal"
    sums = {"w/0.0": FileSum(8, "01234567"), "w/0.1": FileSum(8, "89abcdef")}
    with Journal(path, "a") as journal:
        assert not journal.is_resumed
        journal.begin("a")
        journal.add_piece(3, sums)
        journal.add_hash("file", "00")
        with pytest.raises(Busy, match="another process"):
            Journal(path, "a")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"piece": 4, "fil')
    with Journal(path, "a") as journal:
        assert journal.is_resumed
        assert (journal.pieces, journal.hashes) == ({3: sums}, {"file": "00"})
        journal.add_piece(5, {})
    with Journal(path, "a") as journal:
        assert journal.pieces == {3: sums, 5: {}}
    with Journal(path, "b") as journal:
        assert not journal.is_resumed
        journal.begin("b")
        assert journal.pieces == {}
    path.write_bytes(b"no journal\n")
    with Journal(path, "b") as journal:
        assert not journal.is_resumed


def test_progress_says_rate_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress("copied", 10 * 10**9, stream)
    progress.add(2 * 10**9, is_new=False)  # of an earlier run
    now[0] = 104.0
    progress.add(10**9)
    assert stream.getvalue() == ""  # not more often than every ten seconds in a file
    now[0] = 120.0
    progress.add(10**9)
    assert stream.getvalue() == "copied 4.00 of 10.00 GB, 0.10 GB/s, 00:01:00 left\n"
