"""Decoding against the full forward pass, stopping, and the independence of a row from its company."""

import dataclasses

import jax
import numpy as np
import pytest

import moejax
from moejax.config import ModelConfig, UserError
from moejax.model.transformer import Transformer, init_parameters
from moejax.serving.engine import Engine, GenerationSettings

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=2, num_experts=4, initializer_range=0.4, eos_token_ids=(2,)
)
MODEL = Transformer(CONFIG)
VARIABLES = {"params": init_parameters(MODEL, jax.random.key(3))}
PROMPTS = [[5, 6, 7], [9], [4, 4, 8, 30, 12, 1]]


def greedy_by_recomputing(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(RECOMPUTE(VARIABLES, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


RECOMPUTE = jax.jit(lambda variables, tokens: MODEL.apply(variables, tokens).logits)


def test_greedy_equals_recomputing_everything():
    expected = [greedy_by_recomputing(prompt, 12) for prompt in PROMPTS]
    assert moejax.generate(MODEL, VARIABLES, None, PROMPTS, max_new_tokens=12, ignore_eos=True) == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert moejax.generate(MODEL, VARIABLES, None, prompt, max_new_tokens=12, ignore_eos=True) == tokens


def test_a_row_stops_at_eos_and_the_others_go_on():
    free = Engine(MODEL, VARIABLES).generate(PROMPTS, GenerationSettings(12, ignore_eos=True))
    stop = free[0][4]
    stopping = Transformer(dataclasses.replace(CONFIG, eos_token_ids=(stop,)))
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert Engine(stopping, VARIABLES).generate(PROMPTS, GenerationSettings(12)) == expected
    assert len(expected[0]) <= 4


def test_samples_repeat_by_seed_and_do_not_depend_on_company():
    engine = Engine(MODEL, VARIABLES)
    settings = GenerationSettings(10, temperature=1.0, ignore_eos=True, seed=7)
    together = engine.generate(PROMPTS, settings)
    assert together == engine.generate(PROMPTS, settings)
    for row, prompt in enumerate(PROMPTS):
        assert engine.generate([prompt], dataclasses.replace(settings, seed=7 + row)) == [together[row]]
    assert together != engine.generate(PROMPTS, dataclasses.replace(settings, seed=8))


def test_nothing_asked_for_gives_nothing():
    assert moejax.generate(MODEL, VARIABLES, None, PROMPTS, max_new_tokens=0) == [[], [], []]
    assert moejax.generate(MODEL, VARIABLES, None, []) == []


def test_shapes_compile_once_per_bucket():
    from moejax.serving.engine import decode_step

    engine = Engine(Transformer(dataclasses.replace(CONFIG, max_length=4095)), VARIABLES)
    engine.generate([[1, 2, 3]], GenerationSettings(4, ignore_eos=True))
    compiled = decode_step._cache_size()
    for length in (1, 7, 20, 40):
        engine.generate([list(range(1, length + 1))], GenerationSettings(5, ignore_eos=True))
    assert decode_step._cache_size() == compiled


@pytest.mark.parametrize(("prompts", "options", "message"), [
    ([[]], {}, "prompt 0 has no tokens"),
    ([[1], [50]], {}, "prompt 1 holds token 50, outside the model's vocabulary of 50"),
    ([[-1]], {}, "token -1"),
    (["text"], {}, "no tokenizer"),
    ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
    ([[1]], {"top_p": 0.0}, "top_p=0.0"),
    ([[1]], {"top_k": -2}, "top_k=-2"),
    ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1"),
])  # fmt: skip
def test_bad_requests_are_refused(prompts, options, message):
    with pytest.raises(UserError, match=message):
        moejax.generate(MODEL, VARIABLES, None, prompts, **options)


def test_going_past_the_model_s_positions_warns():
    short = Transformer(dataclasses.replace(CONFIG, max_length=8))
    with pytest.warns(UserWarning, match="past the 8 positions"):
        Engine(short, VARIABLES).generate([[1, 2, 3]], GenerationSettings(6, ignore_eos=True))
