"""A file of prompts: every line answered in order, goes on after any stop, and bad lines are refused by file and line."""

import dataclasses
import json

import jax
import pytest

from moejax.config import ModelConfig, UserError
from moejax.data.text import SentencePieceTokenizer, train_tokenizer
from moejax.data.tokenizer_files import TokenizerSettings
from moejax.generation_config import GenerationSettings
from moejax.model.transformer import Transformer, init_parameters
from moejax.serving.engine import Engine
from moejax.serving.prompt_file import complete_file, count_answered, read_requests

PLAIN = train_tokenizer(["the router sends a token to an expert [INST] [/INST]\n" * 20], 300)
TOKENIZER = SentencePieceTokenizer(PLAIN.model_bytes, TokenizerSettings(chat_format="mistral-v1"))
MODEL = Transformer(
    ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=4,
        initializer_range=0.5, max_length=128,
    )
)  # fmt: skip
VARIABLES = {"params": init_parameters(MODEL, jax.random.key(5))}
ENGINE = Engine(MODEL, VARIABLES, tokenizer=TOKENIZER)
DEFAULTS = GenerationSettings(9, temperature=0.8, seed=3, ignore_eos=True)
LINES = [
    {"prompt": "the router \u2028", "max_new_tokens": 4},
    {"messages": [{"role": "user", "content": "token"}], "temperature": 0, "stop": ["zz"]},
    {"tokens": [5, 6, 7], "logprobs": 2, "prompt_logprobs": 0},
    {"prompt": "an expert", "seed": 11, "logit_bias": {"7": 1.5}},
    {"tokens": [9], "ignore_eos": False, "stop_token_ids": [8]},
]


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def answer(prompts, out, batch_size=2, said=None):
    requests = read_requests(prompts, DEFAULTS, "model")
    complete_file(ENGINE, TOKENIZER, requests, out, batch_size, (said if said is not None else []).append)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write(folder / "in.jsonl", LINES)
    answer(folder / "in.jsonl", folder / "out.jsonl")
    return folder


def test_every_line_is_answered_in_order(folder):
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [made["line"] for made in answers] == [1, 2, 3, 4, 5]
    assert len(answers[0]["tokens"]) == 4 and answers[0]["finish_reason"] == "length"
    assert [score["token"] for score in answers[2]["logprobs"]] == answers[2]["tokens"]
    assert [len(score["top"]) for score in answers[2]["logprobs"]] == [2] * 9
    assert answers[2]["prompt_logprobs"][0] is None and len(answers[2]["prompt_logprobs"]) == 3
    assert "logprobs" not in answers[0]
    for place, (made, request) in enumerate(zip(answers, read_requests(folder / "in.jsonl", DEFAULTS, "model"), strict=True)):
        assert request.settings.seed == (11 if place == 3 else 3 + place)
        (alone,) = ENGINE.complete([request.encode(TOKENIZER, 300)], [request.settings])
        assert (made["tokens"], made["text"], made["finish_reason"]) == (alone.tokens, alone.text, alone.finish_reason)
        assert made["text"] == TOKENIZER.decode(made["tokens"], is_start=False)


@pytest.mark.parametrize("cut", [0, 1, 40, -1, -30])
@pytest.mark.slow
def test_it_goes_on_after_the_last_complete_line(folder, tmp_path, cut):
    whole = (folder / "out.jsonl").read_bytes()
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[:cut])
    said = []
    answer(folder / "in.jsonl", out, batch_size=3, said=said)
    assert out.read_bytes() == whole
    assert "tokens/s" in said[-1] and "5/5" in said[-1]


def test_a_stop_in_the_midst_loses_one_batch_at_most(folder, tmp_path):
    def interrupt(text):
        raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    requests = read_requests(folder / "in.jsonl", DEFAULTS, "model")
    with pytest.raises(KeyboardInterrupt):
        complete_file(ENGINE, TOKENIZER, requests, out, 2, interrupt)
    assert count_answered(out, requests) == 2
    answer(folder / "in.jsonl", out)
    assert out.read_bytes() == (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize("change", ["settings", "model", "lines", "shorter"])
def test_answers_to_something_else_are_not_continued(folder, tmp_path, change):
    lines = {"lines": [LINES[1], *LINES[1:]], "shorter": LINES[:2]}.get(change, LINES)
    settings = dataclasses.replace(DEFAULTS, top_k=5) if change == "settings" else DEFAULTS
    requests = read_requests(write(tmp_path / "in.jsonl", lines), settings, "other" if change == "model" else "model")
    with pytest.raises(UserError, match=r"out\.jsonl, line \d does not answer that line of --prompts.*another --out"):
        count_answered(folder / "out.jsonl", requests)


@pytest.mark.parametrize(("line", "said"), [
    ("{", "is no JSON"),
    ("", "is no JSON"),
    ("[1]", "is list; expected an object"),
    ('{"prompt": "a", "tokens": [1]}', "has prompt and tokens; expected exactly one"),
    ('{"max_new_tokens": 3}', "has no prompt; expected exactly one"),
    ('{"prompt": "a", "temprature": 1}', "no field 'temprature'; did you mean 'temperature'"),
    ('{"prompt": "a", "top_p": 3}', "top_p=3; expected a number above 0"),
    ('{"prompt": 5}', "prompt=5; expected a text"),
    ('{"tokens": ["a"]}', "expected a list of token ids"),
    ('{"messages": "hello"}', "expected a list of messages"),
])  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, said):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        read_requests(path, DEFAULTS, "model")
    assert "in.jsonl, line 2" in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("line", "said"), [
    ({"tokens": [1, 300]}, "tokens holds token 300, outside the model's vocabulary of 300"),
    ({"tokens": []}, "tokens has no tokens"),
    ({"tokens": [1], "logit_bias": {"301": 1}}, "logit_bias holds token 301"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "messages: "),
])  # fmt: skip
def test_what_the_tokenizer_or_the_vocabulary_refuses_is_named_before_anything_is_made(tmp_path, line, said):
    requests = read_requests(write(tmp_path / "in.jsonl", [LINES[0], line]), DEFAULTS, "model")
    with pytest.raises(UserError) as error:
        complete_file(ENGINE, TOKENIZER, requests, tmp_path / "out.jsonl", 1, print)
    assert "in.jsonl, line 2" in str(error.value) and said in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), (b"", "is empty"), (b"\xff", "cannot be read")])
def test_files_that_are_none(tmp_path, content, said):
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_requests(tmp_path / "in.jsonl", DEFAULTS, "model")
    with pytest.raises(UserError, match="cannot be written"):
        count_answered(tmp_path / "nowhere" / "out.jsonl", [])


@pytest.mark.slow
def test_past_the_model_s_positions_is_told(tmp_path):
    said = []
    answer(write(tmp_path / "in.jsonl", [{"tokens": [3] * 126}]), tmp_path / "out.jsonl", said=said)
    assert "past the 128 positions" in said[0]
