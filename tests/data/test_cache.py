"""Entries of the cache: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from moejax.config import DataConfig, UserError
from moejax.data import cache
from moejax.data.cache import INDEX, explain_writing, find_cache, find_entry, lock_entry, make_key
from moejax.data.cache_writer import EntryWriter
from moejax.data.documents import Document

KEY = make_key({"some": "text"})
IDS, SIZES = np.arange(3, 1003) % 700, np.array([1, 499, 500])
HELD_OUT = [Document("x", "ä\n\u2028second line\n"), Document("y:2", "")]


@pytest.fixture
def root(tmp_path):
    """A cache with one whole entry."""
    writer = EntryWriter(tmp_path / KEY, KEY, np.dtype("<u2"))
    writer.append(IDS, SIZES, 4000)
    writer.finish(HELD_OUT, empty=1)
    writer.close()
    return tmp_path


def test_what_is_written_is_read(root):
    entry = find_entry(root, KEY)
    assert entry is not None
    assert sorted(path.name for path in entry.directory.iterdir()) == ["held_out.jsonl", "ids.bin", "index.json", "offsets.bin"]
    assert entry.held_out() == HELD_OUT
    for length in (7, 100):  # rows of any length are cut from the same stream
        rows = entry.rows(length)
        assert (rows.ids == IDS).all() and rows.offsets.tolist() == [0, 1, 500, 1000] and len(rows) == -(-999 // length)
    assert (entry.tokens, entry.index["documents"], entry.index["bytes"], entry.index["empty"]) == (1000, 3, 4000, 1)
    assert find_entry(root, make_key({"other": "text"})) is None


FILES = ["ids.bin", "offsets.bin", "held_out.jsonl", INDEX]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_whatever_is_damaged_is_told_and_gone(root, name, damage):
    damage(root / KEY / name)
    assert find_entry(root, KEY) is None and (root / KEY).exists()  # without the lock nothing is touched
    lines: list[str] = []
    assert find_entry(root, KEY, lines.append) is None
    if lines:
        assert len(lines) == 1 and lines[0].endswith("making them again") and KEY in lines[0] and "\n" not in lines[0]
        assert not (root / KEY).exists()
    else:
        assert name == INDEX  # without an index an entry was never finished, which is no damage


def test_a_flipped_bit_anywhere_in_the_index_is_seen(root):
    path = root / KEY / INDEX
    before = path.read_bytes()
    for where in range(0, len(before), 7):
        flip(path, (where + 0.5) / len(before))
        assert find_entry(root, KEY) is None, where
        path.write_bytes(before)
    assert find_entry(root, KEY) is not None


def test_an_entry_of_another_key_is_not_taken(root):
    other = make_key("other")
    (root / KEY).rename(root / other)
    lines: list[str] = []
    assert find_entry(root, other, lines.append) is None
    assert "is that of another entry" in lines[0]


def test_checksums_of_a_huge_entry_are_compared_when_asked(root, monkeypatch):
    monkeypatch.setattr(cache, "ALWAYS_VERIFIED", 100)
    flip(root / KEY / "ids.bin")
    assert find_entry(root, KEY) is not None
    assert find_entry(root, KEY, verify=True) is None


def test_a_lock_lets_one_in_at_a_time(tmp_path):
    lines: list[str] = []
    inside = threading.Event()

    def enter():
        with lock_entry(tmp_path, KEY, lines.append):
            inside.set()

    with lock_entry(tmp_path, KEY, lines.append):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not inside.wait(0.2)
        with lock_entry(tmp_path, make_key("other"), lines.append):
            pass  # another key has another lock
    thread.join(10)
    assert inside.is_set() and len(lines) == 1 and "waiting for another process" in lines[0]


def test_places(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "a"))
    assert find_cache(DataConfig()) == tmp_path / "a"
    assert find_cache(DataConfig(cache_dir=str(tmp_path / "b"))) == tmp_path / "b"
    monkeypatch.delenv("MOEJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_cache(DataConfig()) == tmp_path / ".cache" / "moejax"


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep tokens in .*file.*MOEJAX_CACHE"), explain_writing(tmp_path / "file" / "cache"):
        pass


def test_a_key_does_not_depend_on_the_order_of_fields():
    assert json.loads(json.dumps(make_key({"b": 1, "a": 2}))) == make_key({"a": 2, "b": 1})
