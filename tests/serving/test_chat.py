"""Conversations: a reply is what the model makes of the whole conversation, and a person's commands do what they say."""

from __future__ import annotations

import dataclasses
import io
import sys

import jax
import pytest

import moejax
from moejax.config import ModelConfig, UserError
from moejax.data.text import SentencePieceTokenizer, train_tokenizer
from moejax.data.tokenizer_files import TokenizerSettings
from moejax.generation_config import GenerationSettings
from moejax.model.transformer import Transformer, init_parameters
from moejax.serving.chat import BUCKET, HELP, Conversation, converse
from moejax.serving.engine import Engine
from tests.conftest import ROOT, run_command

WORDS = "hello there, the router sends a token to an expert and the expert sends it back [INST] [/INST]\n"
PLAIN = train_tokenizer([WORDS * 20], 300)
TOKENIZER = SentencePieceTokenizer(PLAIN.model_bytes, TokenizerSettings(chat_format="mistral-v1"))
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=4, max_length=256,
    initializer_range=0.5,
)  # fmt: skip
MODEL = Transformer(CONFIG)
VARIABLES = {"params": init_parameters(MODEL, jax.random.key(5))}
SETTINGS = GenerationSettings(max_new_tokens=10)


def make(model=MODEL, settings=SETTINGS) -> Conversation:
    return Conversation(model, VARIABLES, TOKENIZER, settings)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def reply_ids(messages, model=MODEL) -> list[int]:
    # An engine with the shapes of a conversation: nothing is compiled for anew.
    return Engine(model, VARIABLES, BUCKET).generate([TOKENIZER.chat(messages)], SETTINGS)[0]


def expected_reply(messages, model=MODEL) -> str:
    return TOKENIZER.decode(reply_ids(messages, model))


@pytest.mark.slow
def test_a_reply_is_that_to_the_whole_conversation():
    conversation = make()
    history = []
    for text in ("hello", "the expert?"):
        history.append(say("user", text))
        pieces = list(conversation.reply(text))
        assert len(pieces) > 2  # it streams
        history.append(say("assistant", expected_reply(history)))
        assert "".join(pieces) == history[-1]["content"] != ""
        assert conversation.messages == history
    assert conversation.undo()
    assert conversation.messages == history[:2]
    conversation.reset()
    assert conversation.messages == []
    assert not conversation.undo()


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["model", "tokenizer"])
def test_a_reply_ends_at_eos(whose, monkeypatch):
    ids = reply_ids([say("user", "hello")])
    stop = ids[5]
    model = MODEL
    if whose == "model":
        model = Transformer(dataclasses.replace(CONFIG, eos_token_ids=(2, stop)))
    else:
        TOKENIZER.decode([stop])  # the bytes of ids are looked up before the id becomes a control id
        monkeypatch.setattr(TOKENIZER, "eos_token_ids", (stop,))
    conversation = make(model, dataclasses.replace(SETTINGS, ignore_eos=True))
    assert "".join(conversation.reply("hello")) == TOKENIZER.decode(ids[: ids.index(stop)])


def test_a_reply_cut_short_is_kept_as_far_as_it_came():
    conversation = make()
    pieces = conversation.reply("hello")
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages == [say("user", "hello"), say("assistant", heard)]


def test_a_conversation_that_fills_the_model_says_so_and_goes_on(capsys):
    conversation = make()
    with pytest.raises(UserError, match=r"would have \d+ tokens.*meant for 256.*/undo.*/reset"):
        list(conversation.reply("token " * 300))
    assert conversation.messages == []
    long = "z" * (250 - len(TOKENIZER.chat([say("user", "")])))
    room = 256 - len(TOKENIZER.chat([say("user", long)]))
    assert 0 < room < 10
    assert len(list(conversation.reply(long))) == room  # one piece a token
    converse(make(), lines=io.StringIO("token " * 300 + "\nhello\n"))
    out, err = capsys.readouterr()
    assert "meant for 256" in err
    assert out == expected_reply([say("user", "hello")]) + "\n"


def test_commands(capsys):
    conversation = make()
    lines = "\n/undo\nhello\n/undo\nhello\n/help\n/what\nthe expert?\n/reset\nthe expert?\n/exit\nhello\n"
    converse(conversation, lines=io.StringIO(lines))
    out, err = capsys.readouterr()
    first = expected_reply([say("user", "hello")])
    second = expected_reply([say("user", "hello"), say("assistant", first), say("user", "the expert?")])
    alone = expected_reply([say("user", "the expert?")])
    assert out == "".join(f"{reply}\n" for reply in (first, first, second, alone))
    assert second != alone
    assert conversation.messages == [say("user", "the expert?"), say("assistant", alone)]
    assert err == (
        f"there is nothing to take back\ntaken back; 0 exchanges are left\n{HELP}\n"
        f"there is no command '/what'\n{HELP}\na new conversation\n"
    )


def test_the_first_message_may_come_from_the_command_line(capsys):
    converse(make(), "hello", io.StringIO(""))
    assert capsys.readouterr().out == expected_reply([say("user", "hello")]) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    moejax.save(folder / "tuned", MODEL, VARIABLES, TOKENIZER)
    moejax.save(folder / "base", MODEL, VARIABLES, PLAIN)
    return folder


def test_chat_through_stdin(place):
    """stdout is the dialogue alone; a model without a format of its own chats in the one that is named."""
    words = ["python", ROOT / "sample.py", "--chat", "--temperature", "0", "--max-new-tokens", "10", "--prompt", "hello"]
    program = 'printf "the expert?\\n/undo\\n" | "$@"'
    first = expected_reply([say("user", "hello")])
    second = expected_reply([say("user", "hello"), say("assistant", first), say("user", "the expert?")])
    words[0] = sys.executable
    result = run_command(["bash", "-c", program, "bash", *words, "--checkpoint", "base", "--chat-format", "mistral-v1"], cwd=place)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{first}\n{second}\n"
    assert "taken back; 1 exchanges are left" in result.stderr
    assert "loaded in" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "base", "--chat"], r"base has no chat format.*--chat-format \(known: mistral-v1, mistral-v3, arctic\)"),
        (["--checkpoint", "base", "--chat", "--chat-format", "mistral-v3"], r"'mistral-v3' does not go.*no \[INST\] and no \[/INST\]"),
        (["--checkpoint", "tuned", "--chat", "--chat-format", "morse"], r"'morse' is unknown; expected one of mistral-v1"),
        (["--checkpoint", "tuned", "--chat", "--ignore-eos"], r"--chat and --ignore-eos exclude each other"),
        (["--checkpoint", "tuned", "--chat-format", "arctic"], r"--chat-format arctic is for conversations; add --chat"),
    ],
)
def test_mistakes_come_before_weights_are_read(place, monkeypatch, words, message):
    import sample

    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr("moejax.checkpoint.store.restore_params", None)
    with pytest.raises(UserError, match=message):
        sample.main(words)
