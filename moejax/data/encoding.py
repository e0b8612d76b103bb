"""Texts to ids in bulk: SentencePiece's threads for little text, worker processes for much, which share no interpreter lock.

A worker is `python -m moejax.data.encoding DIRECTORY`, and not a process of `multiprocessing`: that would run the caller's script or
notebook again where it has no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from moejax.config import UserError
from moejax.data.text import Tokenizer, load_tokenizer

Encoded = tuple[np.ndarray, np.ndarray]  # (ids of the documents one after another, size of each)


class WorkerDied(UserError):
    """A process that tokenises was ended from outside; the text is not to blame."""


def ids_dtype(tokenizer: Tokenizer) -> np.dtype:
    """What its ids are kept as."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], threads: int | None = None) -> Encoded:
    """Ids of each text as the model reads it: BOS, text, EOS (whichever of the two the tokenizer has)."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = list(tokenizer.eos_token_ids[:1])
    encoded = tokenizer.encode_batch(texts, threads)
    sizes = np.array([len(ids) + len(begin) + len(end) for ids in encoded], np.int64)
    pieces = itertools.chain.from_iterable(part for ids in encoded for part in (begin, ids, end))
    return np.fromiter(pieces, ids_dtype(tokenizer), int(sizes.sum())), sizes


def encode_stream(
    tokenizer: Tokenizer, parts: Iterable[Sequence[str]], workers: int | None, in_processes: bool
) -> Generator[Encoded, None, None]:
    """Each part's texts encoded, in order; a few parts are held at a time. Closing it ends the processes.

    `workers` is the number of threads or processes, None: one a core. Raises WorkerDied where a process is ended from outside.
    """
    count = workers or _count_cores()
    if not in_processes or count == 1:
        for texts in parts:
            yield encode_texts(tokenizer, texts, count)
        return
    with _Workers(tokenizer, count) as pool:
        pending: collections.deque[Future[Encoded]] = collections.deque()
        for texts in parts:
            pending.append(pool.submit(texts))
            if len(pending) > 2 * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _count_cores() -> int:
    """The cores this process may use, which a container or a batch system may have made few."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Workers:
    """Processes that encode, each with a thread here that speaks with it."""

    def __init__(self, tokenizer: Tokenizer, count: int):
        self._folder = tempfile.TemporaryDirectory(prefix="moejax-")
        tokenizer.save(self._folder.name)
        self._dtype = ids_dtype(tokenizer)
        self._processes: list[subprocess.Popen] = []
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        # Also at Ctrl-C: processes first, so that no thread waits for one.
        with self._lock:
            self._closed = True
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was on its way to a killed process
                    pipe.close()  # type: ignore[union-attr]
        self._folder.cleanup()

    def submit(self, texts: Sequence[str]) -> Future[Encoded]:
        """The texts' ids, once a process has them."""
        return self._threads.submit(self._encode, list(texts))

    def _encode(self, texts: list[str]) -> Encoded:
        process = getattr(self._mine, "process", None)
        if process is None:
            process = self._mine.process = self._start()
        try:
            _send(process.stdin, texts)
            answer = _receive(process.stdout)
        except (OSError, EOFError) as error:
            raise WorkerDied(
                f"a process that tokenises ended before its time (status {process.wait()}); where memory ran out, give fewer --data.workers"
            ) from error
        if isinstance(answer, str):
            raise RuntimeError(f"a process that tokenises failed: {answer}")
        ids, sizes = answer
        return np.frombuffer(ids, self._dtype), sizes

    def _start(self) -> subprocess.Popen:
        package_home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package_home, os.environ.get("PYTHONPATH"))))
        with self._lock:
            if self._closed:
                raise OSError("the workers are closed")
            process = subprocess.Popen(
                [sys.executable, "-m", "moejax.data.encoding", self._folder.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for the process that asks; the pipe's end tells this one
            )  # fmt: skip
            self._processes.append(process)
        return process


def _send(pipe: IO[bytes] | None, value: Any) -> None:
    assert pipe is not None
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    """What `_send` sent at the pipe's other end, which is this program as well. Raises EOFError where the other has ended."""
    assert pipe is not None
    header = pipe.read(8)
    size = int.from_bytes(header, "little")
    data = pipe.read(size) if len(header) == 8 else b""
    if len(header) < 8 or len(data) < size:
        raise EOFError
    return pickle.loads(data)


def work(directory: str) -> None:
    """A worker: lists of texts come in on stdin, their ids go out on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    tokenizer = load_tokenizer(directory)
    while True:
        try:
            texts = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            ids, sizes = encode_texts(tokenizer, texts, 1)
            _send(answers, (ids.tobytes(), sizes))
        except BrokenPipeError:
            return
        except Exception as error:
            _send(answers, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    work(sys.argv[1])
