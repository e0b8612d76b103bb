"""The kept tokens: what is saved is loaded, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import errno

import numpy as np
import pytest

from moejax.config import DataConfig, Domain
from moejax.data import cache
from moejax.data.sources import Document


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    data = DataConfig(domains=(Domain("a", "builtin:sql"), Domain("b.c", str(tmp_path / "text.txt"))))
    streams = {"a": (np.arange(5, dtype=np.int32), np.array([2, 3])), "b.c": (np.array([70_000], np.int32), np.array([1]))}
    held_out = {"a": [Document("x", "ä\n")], "b.c": []}
    cache.save(tmp_path, data, b"tokenizer", streams, held_out, print)
    return data, streams, held_out


def test_what_is_saved_is_loaded(saved, tmp_path):
    data, streams, held_out = saved
    loaded, texts = cache.load(tmp_path, data, b"tokenizer", print)
    assert texts == held_out
    assert all((left == right).all() for name in streams for left, right in zip(loaded[name], streams[name], strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "text.txt"]
    # Rows of another length are cut from the same stream.
    assert cache.load(tmp_path, dataclasses.replace(data, sequence_length=7), b"tokenizer", print) is not None


def test_other_data_another_tokenizer_and_changed_files_are_seen(saved, tmp_path):
    data, _, _ = saved
    lines: list[str] = []
    assert cache.load(tmp_path, dataclasses.replace(data, seed=1), b"tokenizer", lines.append) is None
    assert cache.load(tmp_path, data, b"other", lines.append) is None
    (tmp_path / "text.txt").write_text("text that changed")
    assert cache.load(tmp_path, data, b"tokenizer", lines.append) is None
    assert len(lines) == 3 and all("reading the text again" in line for line in lines)
    assert cache.load(tmp_path / "elsewhere", data, b"tokenizer", lines.append) is None and len(lines) == 3


@pytest.mark.parametrize("size", [0, 10, 300])
def test_a_broken_file_is_told_and_not_used(saved, tmp_path, size):
    data, _, _ = saved
    path = tmp_path / "data.npz"
    path.write_bytes(path.read_bytes()[:size])
    lines: list[str] = []
    assert cache.load(tmp_path, data, b"tokenizer", lines.append) is None
    assert "cannot be read" in lines[0]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(saved, tmp_path, monkeypatch):
    data, streams, held_out = saved
    before = (tmp_path / "data.npz").read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    lines: list[str] = []
    cache.save(tmp_path, data, b"tokenizer", streams, held_out, lines.append)
    assert "No space left" in lines[0]
    assert (tmp_path / "data.npz").read_bytes() == before and not list(tmp_path.glob(".*"))
