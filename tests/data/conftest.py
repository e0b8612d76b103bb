"""One small trained tokenizer for all tests of the data, and one in the shape of the published chat models."""

from __future__ import annotations

import io

import pytest

from moejax.data import sql, text
from moejax.data.documents import Document

PYTHON = (
    "def read_file(path):\n    with open(path) as file:\n        if file:\n            return file.read()\n\n\nclass Reader:\n    pass\n"
)


@pytest.fixture(scope="session")
def documents():
    """Forty synthetic documents, of one domain."""
    return [Document(f"sql-{index}", sql.generate_document(7, index)) for index in range(40)]


@pytest.fixture(scope="session")
def tokenizer(documents):
    return text.train_tokenizer([PYTHON * 20, *(document.text for document in documents)], 1024)


def train_published(control_symbols: list[str]) -> bytes:
    """A SentencePiece model as published ones are: a space is put before the text, marks are control pieces."""
    import sentencepiece

    buffer = io.BytesIO()
    words = ["user assistant system hello there world", "INST it in st", "[ INST ] [/ INST ]"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=buffer, model_type="bpe", vocab_size=330, byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, control_symbols=control_symbols, minloglevel=2,
    )  # fmt: skip
    return buffer.getvalue()


@pytest.fixture(scope="session")
def published_v3():
    return train_published(["[INST]", "[/INST]"])


@pytest.fixture(scope="session")
def published():
    return train_published([])
