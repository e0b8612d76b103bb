"""Preparing text against SentencePiece itself on the same text, in MB/s of text; and the time a row and a batch take.

The text is JSONL made of the code and the prose of this machine, each document again and again without some of its lines. SentencePiece
encodes the documents from a list in memory, on all cores; `prepare` reads the file, splits it, encodes it and writes it to the cache.
"""

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.bench.measure import describe_timing, summarise_seconds
from moejax.bench.output import Output, report
from moejax.config import DataConfig, Domain


@dataclass(frozen=True)
class Arguments(Output):
    """Times the preparation of text."""

    megabytes: float = 50.0  # of text
    vocab_size: int = 4096
    repeats: int = 3
    workers: int | None = None  # processes and threads; None: one a core
    batch_size: int = 8
    sequence_length: int = 256


def make_text(megabytes: float, seed: int = 0) -> list[str]:
    """Documents of the builtin sources, repeated without a tenth of their lines until the size is reached."""
    from moejax.data.sources import read_documents

    originals = [
        document.text
        for name in ("code", "prose")
        for document in read_documents(Domain(name, f"builtin:{name}"), int(min(megabytes / 2, 8.0) * 1e6), seed)
    ]
    rng, texts, size = random.Random(seed), [], 0
    while size < megabytes * 1e6:
        lines = rng.choice(originals).splitlines(keepends=True)
        texts.append("".join(line for line in lines if rng.random() > 0.1) or "empty\n")
        size += len(texts[-1].encode())
    return texts


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    from moejax.data.batches import make_dataset
    from moejax.data.prepare import prepare
    from moejax.data.text import train_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="moejax-bench-"))
    try:
        texts = make_text(arguments.megabytes)
        size = sum(len(text.encode()) for text in texts) / 1e6
        with (folder / "text.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        tokenizer = train_tokenizer([text[:20_000] for text in texts[:500]], arguments.vocab_size)
        tokenizer.save(folder / "tokenizer")
        data = DataConfig(
            path=str(folder / "text.jsonl"), tokenizer=str(folder / "tokenizer"), sequence_length=arguments.sequence_length,
            cache_dir=str(folder / "cache"), workers=arguments.workers,
        )  # fmt: skip

        def prepare_all() -> Any:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            return prepare(data, arguments.vocab_size, folder / "run", lambda line: None)

        functions = {
            "sentencepiece": lambda: tokenizer._model.encode(texts, num_threads=arguments.workers or os.cpu_count() or 1),
            "prepare": prepare_all,
        }
        seconds, cpu_seconds = _time_in_turns(functions, arguments.repeats)
        started = time.perf_counter()
        prepared = prepare(data, arguments.vocab_size, folder / "run", lambda line: None)
        warm = time.perf_counter() - started
        rates = {name: size / float(np.median(values)) for name, values in seconds.items()}
        ratios = [a / b for a, b in zip(seconds["sentencepiece"], seconds["prepare"], strict=True)]
        rows = prepared.rows["text"]
        seconds_to_prepare = summarise_seconds(seconds["prepare"])
        order = np.random.default_rng(0).permutation(len(rows))[:2000].tolist()
        dataset = make_dataset(data, prepared.rows, arguments.batch_size)
        result = {
            "tokens_per_second": len(rows) * arguments.sequence_length / seconds_to_prepare.median,
            "bytes_per_second": size * 1e6 / seconds_to_prepare.median,
            "ceiling_bytes_per_second": rates["sentencepiece"] * 1e6,
            "fraction_of_ceiling": float(np.median(ratios)),
            "bound": "bytes",
            **describe_timing(seconds_to_prepare),
            "text_megabytes": size,
            "sentencepiece_megabytes_per_second": rates["sentencepiece"],
            "prepare_megabytes_per_second": rates["prepare"],
            "prepare_over_sentencepiece": float(np.median(ratios)),
            "prepare_over_sentencepiece_lowest": min(ratios),
            "prepare_over_sentencepiece_highest": max(ratios),
            # What other programs on the machine do not change: below 1 is what prepare spends beside encoding.
            "sentencepiece_cpu_over_prepare_cpu": cpu_seconds["sentencepiece"] / cpu_seconds["prepare"],
            "warm_start_seconds": warm,
            "row_microseconds": 1e6 * _median_seconds(rows.__getitem__, order),
            "batch_microseconds": 1e6 * _median_seconds(dataset.__getitem__, list(range(300))),
            "batch_size": arguments.batch_size,
            "sequence_length": arguments.sequence_length,
        }
        report("data", result, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _time_in_turns(functions: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each call, CPU seconds of all calls, those of child processes included); in turns: a disturbance meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    cpu_seconds = dict.fromkeys(functions, 0.0)
    for _ in range(repeats):
        for name, function in functions.items():
            started, cpu_started = time.perf_counter(), sum(os.times()[:4])
            function()
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name] += sum(os.times()[:4]) - cpu_started
    return seconds, cpu_seconds


def _median_seconds(function: Callable[[int], Any], arguments: list[int]) -> float:
    seconds = []
    for argument in arguments:
        started = time.perf_counter()
        function(argument)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))
