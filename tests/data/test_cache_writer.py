"""An entry that is written in several goes is the entry written in one."""

from __future__ import annotations

import numpy as np
import pytest

from moejax.data import cache_writer
from moejax.data.cache import PROGRESS, find_entry
from moejax.data.cache_writer import EntryWriter
from moejax.data.documents import Document

DTYPE = np.dtype("<u4")
PARTS = [(np.arange(n, 3 * n) + 70_000, np.array([n, n]), 10 * n) for n in range(1, 12)]


def write(directory, parts, finish=True):
    writer = EntryWriter(directory, "key", DTYPE)
    entry = None
    for ids, sizes, text_bytes in parts[writer.documents // 2 :]:
        writer.append(ids, sizes, text_bytes)
    if finish:
        entry = writer.finish([Document("a", "b")])
    writer.close()
    return entry


@pytest.fixture
def whole(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "COMMIT_BYTES", 150)
    return write(tmp_path / "whole", PARTS)


@pytest.mark.parametrize("stop", range(len(PARTS)))
def test_a_stopped_entry_goes_on_behind_its_last_commit(tmp_path, whole, stop):
    assert write(tmp_path / "key", PARTS[:stop], finish=False) is None
    assert find_entry(tmp_path, "key") is None
    # A commit comes after the 5th part (150 bytes), the 7th, and so on; what is behind it is not kept.
    kept = EntryWriter(tmp_path / "key", "key", DTYPE)
    assert kept.documents == 2 * max((n for n in (5, 8, 10) if n <= stop), default=0)
    assert kept.bytes == sum(text_bytes for *_, text_bytes in PARTS[: kept.documents // 2])
    kept.close()
    assert (tmp_path / "key").exists() == (kept.documents > 0)
    entry = write(tmp_path / "key", PARTS)
    assert entry is not None and entry.index == {**whole.index} and find_entry(tmp_path, "key", verify=True) is not None
    assert not (tmp_path / "key" / PROGRESS).exists()
    for name in ("ids.bin", "offsets.bin", "held_out.jsonl"):
        assert (tmp_path / "key" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", ["ids.bin", "offsets.bin", PROGRESS])
def test_lost_parts_of_a_stopped_entry_are_written_again(tmp_path, whole, name):
    write(tmp_path / "key", PARTS[:9], finish=False)
    path = tmp_path / "key" / name
    path.write_bytes(path.read_bytes()[:-1])
    entry = write(tmp_path / "key", PARTS)
    assert entry.index == whole.index and find_entry(tmp_path, "key", verify=True) is not None


def test_an_abandoned_entry_leaves_nothing(tmp_path, whole):
    writer = EntryWriter(tmp_path / "key", "key", DTYPE)
    for part in PARTS:
        writer.append(*part)
    writer.abandon()
    writer.close()
    assert not (tmp_path / "key").exists()
