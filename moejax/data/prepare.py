"""A run's data made ready: text -> tokenizer -> entries of the cache -> rows; and which entries a run has begun with.

What is in the cache is taken from there; what is not is read, tokenised and kept, by `train.py` and by `moejax-data prepare` alike.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.config import DataConfig, Domain, UserError
from moejax.data.cache import Entry, Log, explain_writing, find_cache, find_entry, lock_entry, make_key
from moejax.data.cache_writer import EntryWriter
from moejax.data.documents import Document, Reading
from moejax.data.encoding import WorkerDied, encode_stream, ids_dtype
from moejax.data.held_out import HEAD, split_stream
from moejax.data.rows import Rows
from moejax.data.run_record import begun_with, has_steps, read_record, require_same, write_record
from moejax.data.run_tokenizer import choose_tokenizer, find_or_train_tokenizer, find_trained_tokenizer
from moejax.data.sources import DEFAULT_MEGABYTES, describe_source, read_documents
from moejax.data.text import Tokenizer

PART = 1_000_000  # characters that a worker gets at a time
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on: the tokenizer; the training rows, the held-out documents and the checksum of each domain, by name."""

    tokenizer: Tokenizer
    rows: dict[str, Rows]
    held_out: dict[str, list[Document]]
    checksums: dict[str, str]


class DomainText:
    """A domain's documents, each with whether it is held out; the first of them can be looked at before they are read."""

    def __init__(self, data: DataConfig, domain: Domain):
        self.domain = domain
        self.reading = Reading(data.skip_bad)
        documents = read_documents(domain, bytes_to_read(data, domain), data.seed, self.reading)
        self._rest = split_stream(documents, data.held_out_fraction, data.seed)
        self._head: collections.deque[tuple[Document, bool]] = collections.deque()
        self.is_small = False  # all of it is in the head; known once there is one

    def head(self) -> list[tuple[Document, bool]]:
        """The first documents, up to HEAD characters; they are read again by iterating."""
        size = sum(len(document.text) for document, _ in self._head)
        while not self.is_small and size < HEAD:
            item = next(self._rest, None)
            if item is None:
                self.is_small = True
            else:
                self._head.append(item)
                size += len(item[0].text)
        return list(self._head)

    def __iter__(self) -> Iterator[tuple[Document, bool]]:
        while self._head:
            yield self._head.popleft()
        yield from self._rest


class Texts:
    """The texts of all domains, each opened once: the tokenizer's sample and the tokens come from one reading."""

    def __init__(self, data: DataConfig):
        self._data = data
        self._open: dict[str, DomainText] = {}

    def open(self, domain: Domain) -> DomainText:
        """The domain's text, at its beginning."""
        if domain.name not in self._open:
            self._open[domain.name] = DomainText(self._data, domain)
        return self._open[domain.name]

    def take(self, domain: Domain) -> DomainText:
        """The domain's text to be read to its end; it is opened anew after that."""
        text = self.open(domain)
        del self._open[domain.name]
        return text


def prepare(
    data: DataConfig, vocab_size: int, directory: str | os.PathLike[str], log: Log = print, given: Tokenizer | None = None
) -> Prepared:
    """The rows and the held-out text of every domain, from the cache as far as they are there, and the run's tokenizer.

    The tokenizer is the one in `directory` (a run that goes on), else `given` (that of the weights the run starts with), else
    `data.tokenizer`, else one trained on the text; it is kept in `directory`. data.json there says which entries the rows come from: a
    run that has taken steps goes on with them even where text has changed since. Logs a line a domain. Raises UserError for text
    or tokenizers that cannot be used, and where a run's entries are gone and cannot be made again as they were.
    """
    place = Path(directory)
    tokenizer, entries = prepare_entries(data, vocab_size, place, log, given)
    keys = {domain.name: settings_key(data, domain, tokenizer) for domain in data.sources}
    write_record(place, data, entries, keys)
    rows = {name: entry.rows(data.sequence_length) for name, entry in entries.items()}
    held_out = {name: entry.held_out() for name, entry in entries.items()}
    return Prepared(tokenizer, rows, held_out, {name: entry.checksum for name, entry in entries.items()})


def prepare_entries(
    data: DataConfig, vocab_size: int | None, directory: Path, log: Log, given: Tokenizer | None, keep_tokenizer: bool = True
) -> tuple[Tokenizer, dict[str, Entry]]:
    """(tokenizer, entry of each domain), made where they are missing. `vocab_size` None: the tokenizer may have any number of pieces."""
    root, texts = find_cache(data), Texts(data)
    tokenizer, is_kept = choose_tokenizer(data, vocab_size, directory, given)
    goes_on = has_steps(directory)
    record = read_record(directory) if goes_on else {}
    if goes_on and not record:
        log(f"{directory} does not say what text it has seen (data.json is missing); taking the text as it is now")
    if tokenizer is None:
        descriptions = {domain.name: describe_domain(data, domain) for domain in data.sources}
        with explain_writing(root):
            tokenizer = find_or_train_tokenizer(data, vocab_size or 0, descriptions, texts, root, log)
    if keep_tokenizer and not is_kept:
        tokenizer.save(directory)
    entries = {}
    for domain in data.sources:
        before = begun_with(record, domain, settings_key(data, domain, tokenizer), root)
        entry = before and find_entry(before.root, before.key)
        if entry is None:
            key = make_key({**describe_domain(data, domain), "tokenizer": describe_tokenizer(tokenizer)})
            with explain_writing(root):
                entry, is_new = find_or_make_entry(data, domain, tokenizer, root, key, texts, log)
            require_same(domain, directory, before, entry)
        else:
            is_new = False
        if not is_new:
            log(f"{domain.name}: {entry.tokens / 1e6:.2f} M tokens kept in {str(entry.directory)!r}")
        entries[domain.name] = entry
    return tokenizer, entries


def find_prepared_tokens(data: DataConfig, vocab_size: int, directory: Path) -> Callable[[Domain], int | None]:
    """A function from a domain to its training tokens, None where they are not in the cache. Reads no text and writes nothing."""
    root, descriptions = find_cache(data), {}
    for domain in data.sources:
        with contextlib.suppress(UserError):  # a path that names nothing yet, a Hub that does not answer
            descriptions[domain.name] = describe_domain(data, domain)
    try:
        tokenizer, _ = choose_tokenizer(data, vocab_size, directory, None)
    except UserError:  # said when the run is started
        tokenizer = None
    if tokenizer is None and len(descriptions) == len(data.sources):
        tokenizer = find_trained_tokenizer(data, vocab_size, descriptions, root)

    def count(domain: Domain) -> int | None:
        if tokenizer is None or domain.name not in descriptions:
            return None
        key = make_key({**descriptions[domain.name], "tokenizer": describe_tokenizer(tokenizer)})
        entry = find_entry(root, key, verify=False)
        return entry and entry.tokens

    return count


def describe_domain(data: DataConfig, domain: Domain) -> dict[str, Any]:
    """All that decides a domain's documents and their split, as JSON. Raises UserError where its path names nothing."""
    return {"source": describe_source(domain), **_describe_settings(data, domain)}


def _describe_settings(data: DataConfig, domain: Domain) -> dict[str, Any]:
    return {
        "builtin": domain.builtin,
        "format": domain.format,
        "text_field": domain.text_field,
        "limit": bytes_to_read(data, domain),
        "held_out_fraction": data.held_out_fraction,
        "skip_bad": data.skip_bad,
        "seed": data.seed,
    }


def settings_key(data: DataConfig, domain: Domain, tokenizer: Tokenizer) -> str:
    """A hash of all that decides an entry but for the text itself, which may change while a run goes on with what it began with."""
    return make_key({"path": domain.path, **_describe_settings(data, domain), "tokenizer": describe_tokenizer(tokenizer)})


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the ids of a text, as JSON."""
    file = hashlib.sha256(tokenizer.model_bytes).hexdigest()
    return {"file": file, "bos": tokenizer.bos_token_id, "eos": list(tokenizer.eos_token_ids[:1])}


def bytes_to_read(data: DataConfig, domain: Domain) -> int:
    """The limit of the domain, or of all domains, in bytes; builtin text always has one."""
    limits = [limit for limit in (domain.max_megabytes, data.max_megabytes) if limit is not None]
    if domain.builtin is not None and not limits:
        limits = [DEFAULT_MEGABYTES]
    return max(int(min(limits) * 1e6), 1) if limits else 2**62


def find_or_make_entry(
    data: DataConfig, domain: Domain, tokenizer: Tokenizer, root: Path, key: str, texts: Texts, log: Log
) -> tuple[Entry, bool]:
    """(the entry of a key, whether it is new): from the cache, or made by reading the text; another process that makes it is waited for."""
    entry = find_entry(root, key)
    if entry is None:
        with lock_entry(root, key, log):
            entry = find_entry(root, key, log)
            if entry is None:
                return _make_entry(data, texts.take(domain), tokenizer, root, key, log), True
    return entry, False


def _make_entry(data: DataConfig, text: DomainText, tokenizer: Tokenizer, root: Path, key: str, log: Log) -> Entry:
    name, reading = text.domain.name, text.reading
    text.head()  # raises where there is no text; nothing is written then
    writer = EntryWriter(root / key, key, ids_dtype(tokenizer))
    progress = _Progress(name, reading, writer, log)
    held_out: list[Document] = []
    sizes: collections.deque[int] = collections.deque()
    parts = _cut_parts(text, writer.documents, held_out, sizes)
    try:
        with contextlib.closing(encode_stream(tokenizer, parts, data.workers, in_processes=not text.is_small)) as encoded:
            for ids, counts in encoded:
                writer.append(ids, counts, sizes.popleft())
                progress.tell()
        entry = writer.finish(held_out, empty=reading.empty, bad=reading.bad, first_bad=reading.first_bad)
    except WorkerDied:
        raise
    except UserError:
        writer.abandon()  # what the text is corrected to has another key
        raise
    finally:
        writer.close()
    log(_summarise(name, entry))
    return entry


def _cut_parts(text: DomainText, done: int, held_out: list[Document], sizes: collections.deque[int]) -> Iterator[list[str]]:
    """The training texts behind the first `done`, some PART characters at a time; held-out ones go to `held_out`, bytes to `sizes`."""
    part: list[str] = []
    characters = 0
    for document, held in text:
        if held:
            held_out.append(document)
        elif done:
            done -= 1
        else:
            part.append(document.text)
            characters += len(document.text)
        if characters >= PART:
            sizes.append(sum(len(text.encode()) for text in part))
            yield part
            part, characters = [], 0
    if part:
        sizes.append(sum(len(text.encode()) for text in part))
        yield part


class _Progress:
    """A line every few seconds: how much of the source is read, how fast text becomes tokens, and the time left."""

    def __init__(self, name: str, reading: Reading, writer: EntryWriter, log: Log):
        self._name, self._reading, self._writer, self._log = name, reading, writer, log
        self._before, self._started = writer.bytes, time.monotonic()
        self._said = self._started
        if writer.bytes:
            log(f"{name}: going on behind {writer.bytes / 1e6:,.1f} MB that were tokenised before")

    def tell(self) -> None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = now
        new = self._writer.bytes - self._before
        # Reading runs a few parts ahead of the tokens, which matters at the beginning only.
        share = min(self._reading.consumed / max(self._reading.total, 1), 1.0)
        left = (now - self._started) * (1 - share) / max(share, 1e-9) if not self._before else None
        rate = new / (now - self._started) / 1e6
        eta = "" if left is None else f", {int(left) // 60}:{int(left) % 60:02d} left"
        read, total = self._reading.consumed / 1e6, self._reading.total / 1e6
        self._log(f"{self._name}: read {read:,.1f} of {total:,.1f} MB, tokenised {self._writer.bytes / 1e6:,.1f} MB, {rate:.1f} MB/s{eta}")


def _summarise(name: str, entry: Entry) -> str:
    index = entry.index
    line = (
        f"{name}: {index['bytes'] / 1e6:.2f} MB in {index['documents']} documents, {entry.tokens / 1e6:.2f} M tokens, "
        f"{index['bytes'] / entry.tokens:.2f} bytes a token; held out {index['held_out_bytes'] / 1e3:.0f} kB in "
        f"{index['held_out_documents']} documents"
    )
    if index["empty"]:
        line += f"; {index['empty']:,} empty left out"
    if index["bad"]:
        line += f"; {index['bad']:,} left out as bad, the first: {index['first_bad']}"
    return line
