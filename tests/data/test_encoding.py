"""Texts to ids in bulk: by threads or by processes, the same ids in the same order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moejax.data import encoding
from moejax.data.encoding import WorkerDied, encode_stream, encode_texts, ids_dtype
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def parts(documents):
    texts = [document.text for document in documents]
    return [texts[n : n + 3] for n in range(0, len(texts), 3)]


def test_a_document_is_its_ids_between_its_marks(tokenizer, documents):
    ids, sizes = encode_texts(tokenizer, [documents[0].text, "ä▁"])
    assert ids.dtype == ids_dtype(tokenizer) == np.uint16
    first, second = np.split(ids, [sizes[0]])
    assert first.tolist() == [1, *tokenizer.encode(documents[0].text, add_bos=False), 2]
    assert second.tolist() == [1, *tokenizer.encode("ä▁", add_bos=False), 2]


@pytest.mark.parametrize("in_processes", [False, True])
def test_all_ways_give_the_same(tokenizer, parts, in_processes):
    expected = [encode_texts(tokenizer, part, 1) for part in parts]
    got = list(encode_stream(tokenizer, iter(parts), 2, in_processes))
    assert len(got) == len(expected)
    for (ids, sizes), (other, others) in zip(got, expected, strict=True):
        assert (ids == other).all() and (sizes == others).all()


def test_only_a_few_parts_are_held_at_a_time(tokenizer):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield ["text"]

    stream = encode_stream(tokenizer, endless(), 2, True)
    for _ in range(10):
        next(stream)
    stream.close()
    assert len(taken) <= 10 + 2 * 2 + 1


def test_a_worker_that_is_killed_is_told(tokenizer, monkeypatch):
    started = []
    start = encoding._Workers._start
    monkeypatch.setattr(encoding._Workers, "_start", lambda self: started.append(start(self)) or started[-1])
    stream = encode_stream(tokenizer, (["text"] for _ in range(1000)), 2, True)
    next(stream)
    started[0].kill()
    with pytest.raises(WorkerDied, match=r"ended before its time \(status -9\); where memory ran out, give fewer --data.workers"):
        list(stream)
    assert all(process.poll() is not None for process in started)


SCRIPT = """
import sys
from moejax.data.encoding import encode_stream
from moejax.data.text import load_tokenizer
def parts():
    while True:
        yield ["some text"] * 100
print("started", flush=True)
for ids, sizes in encode_stream(load_tokenizer(sys.argv[1]), parts(), 2, True):
    print("part", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_script_without_a_guard_starts_workers_and_takes_them_along(tokenizer, tmp_path, number):
    """The script is not run again by its workers, and they end when it does, also when it has no time to say so."""
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "tokenizer")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, cwd=tmp_path,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(5)]
        assert lines == ["started", *["part"] * 4]
        workers = find_workers(process.pid)
        assert len(workers) == 2
        process.send_signal(number)
        out, _ = process.communicate(timeout=20)
        assert "started" not in out
    deadline = time.monotonic() + 20
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers go on without anyone to work for"
        time.sleep(0.02)


def find_workers(parent: int) -> list[int]:
    """The children of a process, by whichever of its threads."""
    lists = Path("/proc", str(parent), "task").glob("*/children")
    return [int(word) for children in lists for word in children.read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
