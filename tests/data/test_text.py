"""Tokenizers: nothing is lost, streaming equals decoding, directories load, errors say where."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest

from moejax.config import UserError
from moejax.data import text
from moejax.data.text import SentencePieceTokenizer, StreamDecoder, TokenizerSettings
from tests.conftest import GOLDEN

SIGNS = "ab \n\t\r\0▁▁😀é中\u2028\ufeff\u2047\u2585\ufffd<s></s><0x41>    "
needs_mistral = pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None, reason="needs the published tokenizer files: pip install --no-deps mistral-common"
)


def random_text(rng: random.Random) -> str:
    def char() -> str:
        return rng.choice(SIGNS) if rng.random() < 0.8 else chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))

    return "".join(char() for _ in range(rng.randrange(15)))


@pytest.mark.parametrize("seed", range(5))
def test_a_trained_tokenizer_loses_nothing(tokenizer, seed):
    rng = random.Random(seed)
    texts = [random_text(rng) for _ in range(300)]
    batch = tokenizer.encode_batch(texts)
    for original, plain in zip(texts, batch, strict=True):
        ids = tokenizer.encode(original)
        assert tokenizer.decode(ids) == original
        assert ids == [tokenizer.bos_token_id, *plain]
        assert all(2 < id < tokenizer.vocab_size for id in plain)  # no control id out of text


def test_a_trained_tokenizer_keeps_layout_in_few_pieces(tokenizer):
    code = "        if file:\n            return file.read()\n"
    assert tokenizer.decode(tokenizer.encode(code)) == code
    assert len(tokenizer.encode(code, add_bos=False)) < len(code) / 2
    assert tokenizer.find_piece("\n▁▁▁") is not None


@pytest.mark.parametrize(
    "vocab_size, texts", [(280, ["abc abc"]), (300, ["".join(map(chr, range(0x4E00, 0x5000)))]), (4096, ["x"]), (1024, ["▁"])]
)
def test_small_texts_and_small_vocabularies_still_work(vocab_size, texts):
    tokenizer = text.train_tokenizer(texts, vocab_size)
    assert tokenizer.vocab_size <= vocab_size
    assert tokenizer.decode(tokenizer.encode("a▁ b\n    é😀")) == "a▁ b\n    é😀"


def test_training_is_deterministic_and_silent(tokenizer, documents, capfd):
    texts = [document.text for document in documents]
    assert text.train_tokenizer(texts, 600).model_bytes == text.train_tokenizer(texts, 600).model_bytes
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["tokenizer", "published"])
def test_streaming_gives_what_decoding_gives(tokenizer, published, kind, seed):
    chosen = tokenizer if kind == "tokenizer" else SentencePieceTokenizer(published)
    rng = random.Random(seed)
    for is_start in (True, False):
        # Bytes are drawn often, so that characters begin and break off.
        ids = [rng.randrange(chosen.vocab_size) if rng.random() < 0.3 else rng.randrange(3, 259) for _ in range(200)] + [10**6]
        stream = StreamDecoder(chosen, is_start)
        assert "".join(map(stream.push, ids)) + stream.finish() == chosen.decode(ids, is_start)


def test_streaming_never_shows_half_a_character(tokenizer):
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(id) for id in tokenizer.encode("a😀b")]
    assert "".join(parts) == "a😀b" and "\ufffd" not in "".join(parts)
    assert stream.finish() == ""
    stream.push(tokenizer.encode("😀", add_bos=False)[0])
    assert stream.finish() == "\ufffd"


def test_a_published_tokenizer_drops_its_space_at_the_start_only(published):
    tokenizer = SentencePieceTokenizer(published)
    ids = tokenizer.encode(" hello  world")
    assert tokenizer.decode(ids) == " hello  world" == tokenizer._model.decode(ids)
    assert tokenizer.decode(tokenizer.encode("hello", add_bos=False), is_start=False) == " hello"
    assert tokenizer.decode(tokenizer.encode_continuation("hello"), is_start=False) == "hello"


def test_saving_and_loading_keep_everything(tokenizer, published, tmp_path):
    changed = SentencePieceTokenizer(
        published, TokenizerSettings(add_bos=False, bos_token_id=5, eos_token_ids=(6, 7), chat_format="arctic")
    )
    for original in (tokenizer, changed):
        original.save(tmp_path / "run")
        (tmp_path / "run" / "checkpoints" / "100").mkdir(parents=True, exist_ok=True)
        for place in ("run", "run/tokenizer.model", "run/checkpoints/100"):
            loaded = text.load_tokenizer(tmp_path / place)
            assert vars(loaded) | {"_model": 0, "_bytes": 0} == vars(original) | {"_model": 0, "_bytes": 0}
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"tokenizer.model", "tokenizer_settings.json", "checkpoints"}


def test_a_published_configuration_redefines_ids(published, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(published)
    added = {"268": {"content": "<|im_start|>"}, "269": {"content": "<|im_end|>"}}
    config = {
        "added_tokens_decoder": added,
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "tokenizer_class": "ArcticTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    tokenizer = text.load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.add_bos, tokenizer.chat_format) == (268, (269,), False, "arctic")
    assert tokenizer.encode("hello") == tokenizer.encode("hello", add_bos=False)
    assert tokenizer.decode([268, *tokenizer.encode("hello"), 269]).strip() == "hello"


def test_user_errors_say_what_and_where(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*does not exist"):
        text.load_tokenizer(tmp_path / "nowhere")
    assert text.find_tokenizer(tmp_path) is None
    with pytest.raises(UserError, match=r"no tokenizer found in .*tokenizer\.model"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"tokenizer\.model' is not a SentencePiece model.*LFS"):
        text.load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_settings.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_settings\.json' is not JSON"):
        text.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no UTF-8 form at character 1"):
        tokenizer.encode("a\udcff")
    with pytest.raises(UserError, match=r"vocab_size=200 is too small.*at least"):
        text.train_tokenizer(["abc"], 200)
    with pytest.raises(UserError, match="no text"):
        text.train_tokenizer([], 1024)


@needs_mistral
@pytest.mark.parametrize("version, file", [("v1", "tokenizer.model.v1"), ("v3", "mistral_instruct_tokenizer_240323.model.v3")])
def test_published_files_give_the_reference_ids(version, file):
    spec = importlib.util.find_spec("mistral_common")
    tokenizer = text.load_tokenizer(Path(spec.submodule_search_locations[0], "data", file))
    for case in json.loads((GOLDEN / f"tokenizer_{version}" / "strings.json").read_text()):
        assert tokenizer.encode(case["text"], add_bos=False) == case["ids"]
        assert tokenizer.encode(case["text"]) == [1, *case["ids"]]
        assert tokenizer.decode(case["ids"]) == case.get("decoded", tokenizer._model.decode(case["ids"]))
    for case in json.loads((GOLDEN / f"tokenizer_{version}" / "conversations.json").read_text()):
        assert tokenizer.chat(case["messages"]) == case["ids"]
