"""Documents -> tokens -> packed rows; and the rows and baselines of the evaluation.

Every domain is tokenised once into one stream, `BOS text EOS BOS text EOS ...`, which is cut into full rows; a row is a
random-access item.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.config import DataConfig, Domain, UserError
from moejax.data import cache
from moejax.data import text as tokenizers
from moejax.data.sources import DEFAULT_MEGABYTES, Document, cut_bytes, read_documents, split_documents

_TOKENIZER_SAMPLE = 4_000_000  # characters the tokenizer is trained on, all domains together
_TOKENIZER_SAMPLE_PER_DOCUMENT = 20_000


class Batch(NamedTuple):
    """Packed rows, all [B, T] (a single row: [T]); a pytree.

    tokens: int32 ids read. targets: int32, the id after each. weights: float32, 1 where the target counts, 0 at a document's
    last token and on padding. segments: int32, the documents of a row numbered from 1, 0 is padding. positions: int32, from 0
    in each segment; a document cut at a row's end is a new segment in the next row.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


class Rows:
    """A stream of documents' ids as rows of `sequence_length` positions, row by number; full but for the last.

    Neighbouring rows share one id, a target in the first and an input in the second, so that no target is lost at a cut.
    """

    def __init__(self, ids: np.ndarray, sizes: np.ndarray, sequence_length: int):
        """ids: the documents' ids one after another [sum(sizes)]; sizes: of each document. Raises UserError below two ids."""
        self.ids, self.sizes = ids, sizes
        self.num_tokens = len(ids)
        if self.num_tokens < 2:
            raise UserError("the documents of a domain have fewer than two tokens; nothing can be predicted, add text")
        self.sequence_length = sequence_length
        self._length = -(-(self.num_tokens - 1) // sequence_length)
        padded = self._length * sequence_length + 1
        self._ids = np.pad(ids.astype(np.int32), (0, padded - len(ids)))
        documents = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self._documents = np.pad(documents, (0, padded - len(ids)), constant_values=-1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: Any) -> Batch:
        """Row `row` as a Batch of [T]; raises IndexError beyond the last."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        span = slice(row * self.sequence_length, (row + 1) * self.sequence_length + 1)
        ids, documents = self._ids[span], self._documents[span]
        same = documents[1:] == documents[:-1]
        real = documents[:-1] >= 0
        index = np.arange(self.sequence_length, dtype=np.int32)
        first = np.concatenate(([True], ~same[:-1]))
        return Batch(
            tokens=ids[:-1],
            targets=ids[1:],
            weights=(same & real).astype(np.float32),
            segments=np.where(real, np.cumsum(first, dtype=np.int32), 0).astype(np.int32),
            positions=np.where(real, index - np.maximum.accumulate(np.where(first, index, 0)), 0).astype(np.int32),
        )


def pack(documents: Sequence[Sequence[int]], sequence_length: int) -> Rows:
    """Rows of documents given as lists of ids."""
    sizes = np.array([len(ids) for ids in documents], np.int32)
    return Rows(np.concatenate([np.asarray(ids, np.int32) for ids in documents]), sizes, sequence_length)


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on: the tokenizer, the training rows and the held-out documents of each domain, by name."""

    tokenizer: tokenizers.Tokenizer
    rows: dict[str, Rows]
    held_out: dict[str, list[Document]]


def prepare(
    data: DataConfig,
    vocab_size: int,
    directory: str | os.PathLike[str],
    log: Callable[[str], None] = print,
    given: tokenizers.Tokenizer | None = None,
) -> Prepared:
    """Reads the text of every domain, holds documents out, gets the run's tokenizer, and packs the training rows.

    The tokenizer is the one in `directory` (a run that goes on), else `given` (that of the weights the run starts with), else
    `data.tokenizer`, else a new one trained on the text;
    it is kept in `directory`, and so are tokens and held-out text, which a run that goes on finds as it left them even where the
    installed packages have changed since. Logs a line a domain. Raises UserError for text or tokenizers that cannot be used.
    """
    known = _load_known_tokenizer(data, vocab_size, Path(directory), given)
    if known is not None:
        kept = cache.load(directory, data, known.model_bytes, log)
        if kept is not None:
            streams, held_out = kept
            return Prepared(known, {name: Rows(*stream, data.sequence_length) for name, stream in streams.items()}, held_out)
    train: dict[str, list[Document]] = {}
    held_out: dict[str, list[Document]] = {}
    for domain in data.sources:
        documents = read_documents(domain, _bytes_to_read(data, domain), data.seed)
        train[domain.name], held_out[domain.name] = split_documents(documents, data.held_out_fraction, data.seed)
    tokenizer = known or tokenizers.train_tokenizer(_sample(data, train), vocab_size)
    tokenizer.save(directory)
    rows = {}
    for name, documents in train.items():
        rows[name] = pack(encode_documents(tokenizer, documents), data.sequence_length)
        read, kept_back = (sum(len(document.text.encode()) for document in side) for side in (documents, held_out[name]))
        log(
            f"{name}: {read / 1e6:.2f} MB in {len(documents)} documents, {rows[name].num_tokens / 1e6:.2f} M tokens, "
            f"{read / rows[name].num_tokens:.2f} bytes a token; held out {kept_back / 1e3:.0f} kB in {len(held_out[name])} documents"
        )
    cache.save(directory, data, tokenizer.model_bytes, {name: (part.ids, part.sizes) for name, part in rows.items()}, held_out, log)
    return Prepared(tokenizer, rows, held_out)


def _bytes_to_read(data: DataConfig, domain: Domain) -> int:
    """The limit of the domain, or of all domains, in bytes; builtin text always has one."""
    limits = [limit for limit in (domain.max_megabytes, data.max_megabytes) if limit is not None]
    if domain.builtin is not None and not limits:
        limits = [DEFAULT_MEGABYTES]
    return max(int(min(limits) * 1e6), 1) if limits else 2**62


def _load_known_tokenizer(
    data: DataConfig, vocab_size: int, directory: Path, given: tokenizers.Tokenizer | None
) -> tokenizers.Tokenizer | None:
    if given is None and data.tokenizer is not None:
        given = tokenizers.load_tokenizer(data.tokenizer)
    kept = tokenizers.find_tokenizer(directory) if directory.is_dir() else None
    if given is not None and kept is not None and given.model_bytes != kept.model_bytes:
        other, flag = (
            ("that of init_from", "--init-from") if data.tokenizer is None else (f"data.tokenizer={data.tokenizer!r}", "--data.tokenizer")
        )
        raise UserError(
            f"the run directory {str(directory)!r} was begun with another tokenizer than {other}; "
            f"leave {flag} out to go on with that run, or choose another --run-dir"
        )
    tokenizer = kept or given
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        where = f"in the run directory {str(directory)!r}" if kept is not None else f"data.tokenizer={data.tokenizer!r}"
        remedy = f"set --model.vocab-size {tokenizer.vocab_size} or more" + (", or choose another --run-dir" if kept is not None else "")
        raise UserError(f"the tokenizer {where} has {tokenizer.vocab_size} pieces but model.vocab_size={vocab_size}; {remedy}")
    return tokenizer


def _sample(data: DataConfig, train: Mapping[str, Sequence[Document]]) -> Iterator[str]:
    """Text to train the tokenizer on: of each domain by its weight, from the beginnings of many documents."""
    shares = _shares(data)
    for domain in data.sources:
        left = int(_TOKENIZER_SAMPLE * shares[domain.name])
        several = len(train[domain.name]) * _TOKENIZER_SAMPLE_PER_DOCUMENT > left
        for document in train[domain.name]:
            part = document.text[: min(left, _TOKENIZER_SAMPLE_PER_DOCUMENT if several else left)]
            left -= len(part)
            yield part
            if left <= 0:
                break


def _shares(data: DataConfig) -> dict[str, float]:
    """Each domain's share of the tokens of all stages; a stage as long as the run counts as much as the others together."""
    known = sum(stage.tokens or 0 for stage in data.curriculum) or 1
    shares = dict.fromkeys((domain.name for domain in data.sources), 0.0)
    for stage in data.curriculum:
        for name, weight in stage.weights.items():
            shares[name] += (stage.tokens or known) * weight / sum(stage.weights.values())
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def encode_documents(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> list[list[int]]:
    """Ids of each document as the model reads it: BOS, text, EOS (whichever of the two the tokenizer has)."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = list(tokenizer.eos_token_ids[:1])
    return [[*begin, *ids, *end] for ids in tokenizer.encode_batch([document.text for document in documents])]


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
    tokenizer: tokenizers.Tokenizer, documents: Sequence[Document], sequence_length: int, max_bytes: int | None = None
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
