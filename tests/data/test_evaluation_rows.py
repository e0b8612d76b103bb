"""Held-out text as rows: every byte counted once, and gzip over the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from moejax.config import UserError
from moejax.data.documents import Document
from moejax.data.evaluation_rows import evaluation_rows, gzip_bits_per_byte, iterate_rows, take_bytes
from moejax.data.rows import Batch

LENGTH = 16


@pytest.mark.parametrize("max_bytes", [None, 1, 100, 5000, 10**7])
def test_evaluation_counts_every_byte_once(tokenizer, documents, max_bytes):
    texts = [*documents, Document("x", "ä▁😀" * 30)]
    rows, utf8_bytes = evaluation_rows(tokenizer, texts, LENGTH, max_bytes)
    counted = rows.targets[rows.weights == 1].tolist()
    taken = take_bytes(texts, max_bytes)
    assert b"".join(map(tokenizer.token_bytes, counted)).decode() == "".join(document.text for document in taken)
    assert utf8_bytes == sum(len(document.text.encode()) for document in taken) <= (max_bytes or 10**9)
    assert rows.weights.sum() == len(counted) and not {1, 2} & set(counted)
    if max_bytes is None or max_bytes == 10**7:
        assert taken == texts
    elif max_bytes >= 100:
        assert utf8_bytes > max_bytes - 100


def test_evaluation_batches_hold_all_rows_and_padding_only(tokenizer, documents):
    rows, _ = evaluation_rows(tokenizer, documents, LENGTH, 3000)
    parts = list(iterate_rows(rows, 7))
    assert all(part.tokens.shape == (7, LENGTH) for part in parts)
    joined = Batch(*map(np.concatenate, zip(*parts, strict=True)))
    count = len(rows.tokens)
    assert all((left[:count] == right).all() for left, right in zip(joined, rows, strict=True))
    assert not joined.weights[count:].any() and not joined.segments[count:].any()


def test_gzip_reads_the_same_bytes(documents):
    assert 0 < gzip_bits_per_byte(documents, 4000) < 8
    assert gzip_bits_per_byte([Document("x", "a" * 10**5)]) < 0.02
    with pytest.raises(UserError, match="no held-out text"):
        gzip_bits_per_byte([])
