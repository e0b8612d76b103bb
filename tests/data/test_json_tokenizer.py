"""Directories that carry a tokenizer.json only."""

from __future__ import annotations

import json
import sys

import pytest

from moejax.config import UserError
from moejax.data.text import StreamDecoder, load_tokenizer


@pytest.fixture
def directory(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package 'tokenizers': pip install tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<begin>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["hello world"] * 10, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<begin>", "eos_token": {"content": "<end>"}}))
    return tmp_path


def test_a_directory_with_tokenizer_json_alone_loads(directory):
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("hello 😀▁\n")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, ids[0]) == (0, (1,), 0)
    assert tokenizer.decode([*ids, 1]) == "hello 😀▁\n"
    assert tokenizer.encode_batch(["hello 😀▁\n", ""]) == [ids[1:], []]
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(id) for id in ids]
    assert "".join(parts) + stream.finish() == "hello 😀▁\n" and not any("\ufffd" in part for part in parts)
    tokenizer.save(directory / "saved")
    again = load_tokenizer(directory / "saved")
    assert again.encode("hello") == tokenizer.encode("hello") and again.eos_token_ids == (1,)
    with pytest.raises(UserError, match="no chat format"):
        tokenizer.chat([{"role": "user", "content": "hello"}])


def test_what_cannot_be_read_is_named(directory, monkeypatch):
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json' is not a tokenizer\.json"):
        load_tokenizer(directory)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(directory)
