"""Random requests: none crashes, every mistake is named, every row is as it is alone, and nothing is compiled beyond the buckets."""

import random
import warnings

import jax
import pytest

import moejax
from moejax.cache_config import CacheConfig
from moejax.config import ModelConfig, UserError
from moejax.data.text import train_tokenizer
from moejax.model.prefill import read_chunk
from moejax.model.transformer import Transformer, init_parameters
from moejax.serving.decoding import choose_first, decode
from moejax.serving.engine import Engine

TOKENIZER = train_tokenizer(["the router sends a token to an expert, and the expert sends it back\n" * 20], 300)
MODEL = Transformer(
    ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=4,
        initializer_range=0.4, max_length=100,
    )
)  # fmt: skip
VARIABLES = {"params": init_parameters(MODEL, jax.random.key(1))}
MISTAKES = [
    ("max_new_tokens", -1), ("temperature", -0.5), ("temperature", "hot"), ("top_k", -2), ("top_k", 0.5), ("top_p", 0), ("top_p", 1.5),
    ("min_p", 2), ("repetition_penalty", 0), ("frequency_penalty", float("nan")), ("presence_penalty", None), ("logit_bias", {-1: 1}),
    ("logit_bias", {300: 1}), ("stop", [[""]]), ("stop_token_ids", [300]), ("logprobs", -1), ("seed", 0.5), ("ignore_eos", "no"),
    ("sampling", 1),
]  # fmt: skip


def make_prompt(rng, texts):
    if texts:
        return rng.choice(["a token", "router", "the expert sends it", "é"])
    return [rng.randrange(300) for _ in range(rng.choice([1, 2, 9, 30, 63, 64, 90, 130]))]


def make_options(rng, rows, plain):
    """Options, each for all rows or a list with one per row. Plain ones have no log-probabilities, penalties or biases, others all three,
    as each of them is a program of its own."""
    values = {
        "max_new_tokens": lambda: rng.choice([0, 1, 2, 8, 9, 17]),
        "temperature": lambda: rng.choice([0, 0.7, 1.5]),
        "top_k": lambda: rng.choice([0, 1, 40, 10**12]),
        "top_p": lambda: rng.choice([1, 0.9, 1e-6]),
        "min_p": lambda: rng.choice([0, 0.1, 1]),
        "repetition_penalty": lambda: rng.choice([1, 1.3]),
        "frequency_penalty": lambda: rng.choice([0, -0.5, 2]),
        "presence_penalty": lambda: rng.choice([0, 1]),
        "seed": lambda: rng.choice([0, 7, -1, 2**40]),
        "ignore_eos": lambda: rng.random() < 0.5,
        "logit_bias": lambda: {rng.randrange(300): 100.0, 5: -2},
        "stop_token_ids": lambda: [rng.randrange(300) for _ in range(3)],
    }
    options = {"max_new_tokens": values.pop("max_new_tokens")()}
    rich = {name: values.pop(name) for name in sorted(values) if name.endswith("penalty") or name == "logit_bias"}
    if not plain:
        options |= {"logprobs": rng.choice([1, 3]), "logit_bias": {rng.randrange(300): 100.0}}
        options |= {name: [make() for _ in range(rows)] for name, make in rich.items()} | {"presence_penalty": 1}
    for name in rng.sample(sorted(values), rng.randint(0, 4)):
        options[name] = [values[name]() for _ in range(rows)] if rng.random() < 0.5 else values[name]()
    return options


def spoil(rng, prompts, options):
    """Makes one mistake; returns what the error must name."""
    if rng.random() < 0.3:
        place = rng.randrange(len(prompts))
        prompts[place] = rng.choice([[], [300], [-1, 3]])
        return f"prompt {place} "
    name, value = rng.choice(MISTAKES)
    if name != "sampling" and name != "stop_token_ids" and rng.random() < 0.5:
        options[name] = [value] * (len(prompts) + rng.randint(0, 1))
    else:
        options[name] = value
    return name


def run_requests(seed, count):
    rng = random.Random(seed)
    programs = (read_chunk, choose_first, decode)
    before = sum(program._cache_size() for program in programs)
    engines, kinds = [Engine(MODEL, VARIABLES, cache=cache) for cache in (CacheConfig(), CacheConfig("sinks", 2, 30))], set()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt .* go past the 100 positions")
        for _ in range(count):
            texts, rows, plain = rng.random() < 0.3, rng.choice([1, 1, 3, 4]), rng.random() < 0.5
            prompts, options = [make_prompt(rng, texts) for _ in range(rows)], make_options(rng, rows, plain)
            engine = rng.choice(engines) if plain else engines[0]
            options["cache"] = engine.cache
            if rng.random() < 0.3:
                named = spoil(rng, prompts, options)
                with pytest.raises(UserError) as error:
                    moejax.generate(MODEL, VARIABLES, TOKENIZER, prompts, return_details=True, **options)
                assert named in str(error.value) and "\n" not in str(error.value)
                continue
            made = moejax.generate(MODEL, VARIABLES, TOKENIZER, prompts, return_details=True, **options)
            most = options["max_new_tokens"]
            for row in made:
                assert len(row.tokens) <= most and (row.finish_reason == "stop" or len(row.tokens) == most)
                assert row.text == TOKENIZER.decode(row.tokens, is_start=False)
                assert row.logprobs is None or [score.token for score in row.logprobs] == row.tokens
            if most:
                lengths = [len(TOKENIZER.encode(prompt) if texts else prompt) for prompt in prompts]
                kinds.add((*engine.shapes(lengths, [most] * rows), plain, engine.cache.kind))
    compiled = sum(program._cache_size() for program in programs) - before
    assert compiled <= len(programs) * len(kinds), f"{compiled} programs for {len(kinds)} kinds of batches"


@pytest.mark.slow
def test_five_hundred_random_requests():
    run_requests(1, 500)
