"""transformers gives the ids that our tokenizer gives, from what export writes beside it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moejax.checkpoint.tokenizer_export import describe_tokenizer, write_tokenizer_config
from moejax.config import UserError
from moejax.data.text import train_tokenizer

TEXTS = [
    "def read_file(path):\n    return open(path).read()\n",
    "Hi there, wörld 😀",
    "  two  spaces",
    "\n\n\tx",
    "class A:\n    def f(self):\n        return 1\n\n\n            x  \n",
]


@pytest.fixture(scope="module")
def tokenizer():
    words = [f"word{n % 97} = {n * n}\n    call(x{n % 13}, 'é{n % 7}')\n" for n in range(3000)]
    return train_tokenizer([*words, *TEXTS * 20], 1200)


def test_what_is_said_is_what_the_model_holds(tokenizer):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    values = describe_tokenizer(tokenizer.model_bytes, {"add_bos": False, "bos_token_id": 2, "eos_token_ids": [1]})
    assert (values["bos_token"], values["eos_token"], values["unk_token"]) == ("</s>", "<s>", "<unk>")
    assert values["add_bos_token"] is False
    added = {int(number): token["content"] for number, token in values["added_tokens_decoder"].items()}
    assert added == {number: model.id_to_piece(number) for number in added}
    assert {piece for piece in added.values()} >= {"\n▁▁▁", "\n▁▁▁▁▁▁▁"}


def test_what_came_with_the_model_is_kept(tmp_path, tokenizer):
    write_tokenizer_config(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    write_tokenizer_config(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"


def test_a_damaged_model_is_named(tmp_path, tokenizer):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes[:-5])
    with pytest.raises(UserError, match=r"tokenizer.model is no whole SentencePiece model"):
        write_tokenizer_config(tmp_path)


TRANSFORMERS = """
import sys, json, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.loads(sys.stdin.read())
ids = [tokenizer(text)["input_ids"] for text in texts]
assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == texts
print(json.dumps([ids, tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)]))
"""


@pytest.mark.torch
def test_transformers_gives_the_same_ids(tmp_path, tokenizer):
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    write_tokenizer_config(tmp_path)
    command = [sys.executable, "-c", TRANSFORMERS, tmp_path]
    ran = subprocess.run(command, input=json.dumps(TEXTS), text=True, capture_output=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    ids, bos, eos, size = json.loads(ran.stdout)
    assert ids == [tokenizer.encode(text) for text in TEXTS]
    assert (bos, eos) == (1, 2)
    assert size <= 1200
