"""The tokenizer of a run: the one it has, the one it is given, or one trained on a sample of its text, which is kept in the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from moejax.config import DataConfig, Domain, UserError
from moejax.data import text as tokenizers
from moejax.data.cache import INDEX, Log, make_key, read_sealed, write_sealed
from moejax.data.documents import Document
from moejax.files import measure_file

_SAMPLE = 4_000_000  # characters the tokenizer is trained on, all domains together
_SAMPLE_PER_DOCUMENT = 20_000


class _Text(Protocol):
    def head(self) -> list[tuple[Document, bool]]: ...


class _Texts(Protocol):
    def open(self, domain: Domain) -> _Text: ...


def choose_tokenizer(
    data: DataConfig, vocab_size: int | None, directory: Path, given: tokenizers.Tokenizer | None
) -> tuple[tokenizers.Tokenizer | None, bool]:
    """(tokenizer, whether it is kept in `directory`): the one kept there, else `given`, else that of data.tokenizer, else None.

    Raises UserError where two of them differ, and for one with more than `vocab_size` pieces.
    """
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
    if tokenizer is not None and vocab_size is not None and tokenizer.vocab_size > vocab_size:
        where = f"in the run directory {str(directory)!r}" if kept is not None else f"data.tokenizer={data.tokenizer!r}"
        remedy = f"set --model.vocab-size {tokenizer.vocab_size} or more" + (", or choose another --run-dir" if kept is not None else "")
        raise UserError(f"the tokenizer {where} has {tokenizer.vocab_size} pieces but model.vocab_size={vocab_size}; {remedy}")
    return tokenizer, kept is not None


def find_or_train_tokenizer(
    data: DataConfig, vocab_size: int, descriptions: Mapping[str, Any], texts: _Texts, root: Path, log: Log
) -> tokenizers.Tokenizer:
    """A tokenizer trained on the beginnings of the domains' training text, by their weights; from the cache where it was trained before.

    `descriptions` say all that decides the text of each domain.
    """
    shares = share_of_domains(data)
    directory = _place(data, vocab_size, descriptions, root)
    kept = _find(directory, log)
    if kept is not None:
        return kept
    tokenizer = tokenizers.train_tokenizer(_sample(data, shares, texts), vocab_size)
    temporary = root / f".{directory.name}.{os.getpid()}.part"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that had this one's number before
    try:
        tokenizer.save(temporary)
        files = {path.name: measure_file(path)[1] for path in temporary.iterdir()}
        write_sealed(temporary / INDEX, {"files": files})
        if not directory.exists():
            os.replace(temporary, directory)
    except OSError:
        # Another process was here first with the same tokenizer; anything else is told as what it is.
        if not directory.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tokenizer


def find_trained_tokenizer(data: DataConfig, vocab_size: int, descriptions: Mapping[str, Any], root: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer that `find_or_train_tokenizer` would find, None where it would train one."""
    return _find(_place(data, vocab_size, descriptions, root), None)


def _place(data: DataConfig, vocab_size: int, descriptions: Mapping[str, Any], root: Path) -> Path:
    import sentencepiece

    shares = share_of_domains(data)
    described = [[domain.name, descriptions[domain.name], shares[domain.name]] for domain in data.sources]
    return root / f"tokenizer-{make_key({'tokenizer': vocab_size, 'sentencepiece': sentencepiece.__version__, 'text': described})}"


def _find(directory: Path, log: Log | None) -> tokenizers.Tokenizer | None:
    if not directory.is_dir():
        return None
    index = read_sealed(directory / INDEX)
    if index is not None and all(
        (directory / name).is_file() and measure_file(directory / name)[1] == crc for name, crc in index["files"].items()
    ):
        return tokenizers.load_tokenizer(directory)
    if log is not None:
        log(f"the kept tokenizer in {str(directory)!r} is broken; training it again")
        shutil.rmtree(directory, ignore_errors=True)
    return None


def _sample(data: DataConfig, shares: Mapping[str, float], texts: _Texts) -> Iterator[str]:
    """Text to train the tokenizer on: of each domain by its weight, from the beginnings of many documents."""
    for domain in data.sources:
        left = int(_SAMPLE * shares[domain.name])
        train = [document.text for document, held in texts.open(domain).head() if not held]
        several = len(train) * _SAMPLE_PER_DOCUMENT > left
        for text in train:
            part = text[: min(left, _SAMPLE_PER_DOCUMENT if several else left)]
            left -= len(part)
            yield part
            if left <= 0:
                break


def share_of_domains(data: DataConfig) -> dict[str, float]:
    """Each domain's share of the tokens of all stages; a stage as long as the run counts as much as the others together."""
    known = sum(stage.tokens or 0 for stage in data.curriculum) or 1
    shares = dict.fromkeys((domain.name for domain in data.sources), 0.0)
    for stage in data.curriculum:
        for name, weight in stage.weights.items():
            shares[name] += (stage.tokens or known) * weight / sum(stage.weights.values())
    return {name: share / sum(shares.values()) for name, share in shares.items()}
