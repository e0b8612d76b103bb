"""Held-out text as rows that count every byte once, and what gzip makes of the same text."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence

import numpy as np

from moejax.config import UserError
from moejax.data.documents import Document, cut_bytes
from moejax.data.rows import Batch, pack
from moejax.data.text import Tokenizer


def take_bytes(documents: Sequence[Document], max_bytes: int | None) -> list[Document]:
    """The first documents up to `max_bytes` UTF-8 bytes, the last cut at a line's (or a character's) end; None: all of them."""
    if max_bytes is None:
        return list(documents)
    taken: list[Document] = []
    left = max_bytes
    for document in documents:
        data = document.text.encode()
        if len(data) > left:
            data = cut_bytes(data, left)
            left = 0
        left -= len(data)
        if data:
            taken.append(Document(document.name, data.decode()))
        if left <= 0:
            break
    return taken


def evaluation_rows(
    tokenizer: Tokenizer, documents: Sequence[Document], sequence_length: int, max_bytes: int | None = None
) -> tuple[Batch, int]:
    """(rows, utf8_bytes): the documents, cut to `max_bytes`, as a Batch [rows, T], and the bytes of text that its targets spell.

    bits per byte = sum(weights * nll) / ln 2 / utf8_bytes. Every token of the text is a target once, with the row up to it as
    context; BOS and EOS are not, so that the number compares with a compressor's. Raises UserError where there is no text.
    """
    taken = take_bytes(documents, max_bytes)
    begin = next((id for id in (tokenizer.bos_token_id, *tokenizer.eos_token_ids) if id is not None), None)
    if begin is None:
        raise UserError(
            "the tokenizer has neither BOS nor EOS, so nothing stands before a text's first token; evaluate with another tokenizer"
        )
    if not taken:
        raise UserError(f"no held-out text to evaluate within {max_bytes} bytes; raise train.eval_kilobytes or data.held_out_fraction")
    encoded = tokenizer.encode_batch([document.text for document in taken])
    rows = pack([[begin, *ids] for ids in encoded], sequence_length)
    batch = Batch(*map(np.stack, zip(*(rows[index] for index in range(len(rows))), strict=True)))
    return batch, sum(len(document.text.encode()) for document in taken)


def iterate_rows(rows: Batch, batch_size: int) -> Iterator[Batch]:
    """Batches of exactly `batch_size` of the rows [R, T], in order; the last is filled up with rows of padding (weights and segments 0)."""
    for start in range(0, len(rows.tokens), batch_size):
        part = Batch(*(array[start : start + batch_size] for array in rows))
        missing = batch_size - len(part.tokens)
        yield Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in part)) if missing else part


def gzip_bits_per_byte(documents: Sequence[Document], max_bytes: int | None = None) -> float:
    """Bits per byte of `gzip -9` over the documents one after another, cut to `max_bytes` as `evaluation_rows` cuts them."""
    data = "".join(document.text for document in take_bytes(documents, max_bytes)).encode()
    if not data:
        raise UserError("no held-out text to compress; raise train.eval_kilobytes or data.held_out_fraction")
    return 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
