"""The benchmark of the data: its text, and its JSON."""

from __future__ import annotations

import json

from moejax.bench.data import make_text
from tests.conftest import run_command


def test_hardly_two_documents_are_alike_and_the_size_is_what_was_asked_for():
    texts = make_text(0.5)
    assert len(set(texts)) > 0.9 * len(texts) and all(text.strip() for text in texts)
    assert 0.5e6 <= sum(len(text.encode()) for text in texts) < 1e6
    assert make_text(0.5) == texts != make_text(0.5, seed=1)


def test_json_is_all_that_is_printed():
    result = run_command(
        ["python", "-m", "moejax.bench", "data", "--megabytes", "0.3", "--vocab-size", "300", "--repeats", "1", "--json", "-"]
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["prepare_over_sentencepiece"] > 0 and values["row_microseconds"] > 0 and values["batch_microseconds"] > 0
