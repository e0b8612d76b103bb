"""Decoding against the full forward pass, stopping, and the independence of a row from its company."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.cache_config import CacheConfig
from moejax.config import ModelConfig, UserError
from moejax.data.text import train_tokenizer
from moejax.generation_config import GenerationSettings
from moejax.model.prefill import read_chunk
from moejax.model.transformer import Transformer, init_parameters, unstack_layers
from moejax.ops.matmul import InputMajor, as_output_major
from moejax.serving.decoding import choose_first, decode
from moejax.serving.engine import Engine, round_up

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=2, num_experts=4, initializer_range=0.4, eos_token_ids=(2,)
)
MODEL = Transformer(CONFIG)
VARIABLES = {"params": init_parameters(MODEL, jax.random.key(3))}
PROMPTS = [[5, 6, 7], [9], [4, 4, 8, 30, 12, 1]]
PROGRAMS = (read_chunk, choose_first, decode)


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


@pytest.mark.slow
def test_rows_have_settings_and_ends_of_their_own():
    """In any company: the same rows alone, together, and in another order."""
    rows = [
        GenerationSettings(3, ignore_eos=True),
        GenerationSettings(11, temperature=0.9, seed=4, top_k=9, ignore_eos=True),
        GenerationSettings(0),
        GenerationSettings(7, temperature=1.2, seed=5, min_p=0.1, repetition_penalty=1.5, presence_penalty=0.5, logit_bias={7: 3.0}),
        GenerationSettings(10, repetition_penalty=1.8, frequency_penalty=2.0, ignore_eos=True),
    ]
    prompts = [PROMPTS[row % 3] for row in range(5)]
    engine = Engine(MODEL, VARIABLES)
    together = engine.complete(prompts, rows)
    assert [len(made.tokens) for made in together[:3]] == [3, 11, 0]
    assert together[0].tokens == greedy_by_recomputing(prompts[0], 3)
    assert [made.finish_reason for made in together[:3]] == ["length"] * 3
    assert engine.complete(prompts[::-1], rows[::-1]) == together[::-1]
    for prompt, settings, made in zip(prompts, rows, together, strict=True):
        assert engine.complete([prompt], [settings]) == [made]


@pytest.mark.slow
def test_penalties_count_what_was_generated():
    settings = GenerationSettings(8, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3, ignore_eos=True)
    made = Engine(MODEL, VARIABLES).generate([PROMPTS[2]], settings)[0]
    tokens = list(PROMPTS[2])
    for _ in range(8):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.array(RECOMPUTE(VARIABLES, padded)[0, len(tokens) - 1])
        seen, counts = np.unique(tokens), np.bincount(tokens[len(PROMPTS[2]) :], minlength=50)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        tokens.append(int(np.argmax(logits - 0.7 * counts - 0.4 * (counts > 0))))
    assert made == tokens[len(PROMPTS[2]) :]
    assert made != greedy_by_recomputing(PROMPTS[2], 8)


def test_log_probabilities_are_the_full_forward_s():
    settings = GenerationSettings(11, temperature=1.0, top_k=20, presence_penalty=0.5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    for prompt, made in zip(PROMPTS, Engine(MODEL, VARIABLES).complete(PROMPTS, settings), strict=True):
        tokens = prompt + made.tokens
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        exact = np.asarray(jax.nn.log_softmax(RECOMPUTE(VARIABLES, padded)[0]))
        assert made.prompt_logprobs[0] is None
        scores = made.prompt_logprobs[1:] + made.logprobs
        assert [score.token for score in scores] == tokens[1:]
        assert [len(score.top) for score in scores] == [2] * (len(prompt) - 1) + [3] * 11
        for place, score in enumerate(scores):
            assert score.logprob == pytest.approx(exact[place, score.token], abs=1e-4)
            order = np.argsort(-exact[place])[: len(score.top)]
            assert [id for id, _ in score.top] == order.tolist()
            assert [value for _, value in score.top] == pytest.approx(exact[place, order].tolist(), abs=1e-4)


@pytest.mark.slow
def test_only_the_prompt_s_log_probabilities():
    (made,) = Engine(MODEL, VARIABLES).complete([PROMPTS[2]], GenerationSettings(0, prompt_logprobs=0))
    assert (made.tokens, made.finish_reason, len(made.prompt_logprobs)) == ([], "length", 6)
    assert made.prompt_logprobs[1].top == ()


@pytest.mark.slow
def test_prompts_longer_than_a_chunk_are_read_in_chunks():
    """Log-probabilities and routing of the prompt come together again, too."""
    settings = GenerationSettings(3, prompt_logprobs=1, ignore_eos=True)
    prompts = [PROMPTS[2] * 2, PROMPTS[0]]
    whole = Engine(MODEL, VARIABLES).complete(prompts, settings, return_routing=True)
    for expected, made in zip(whole, Engine(MODEL, VARIABLES, chunk=5).complete(prompts, settings, return_routing=True), strict=True):
        assert made.tokens == expected.tokens
        known, exact = made.prompt_logprobs[1:], expected.prompt_logprobs[1:]
        assert [score.token for score in known] == [score.token for score in exact]
        assert [score.logprob for score in known] == pytest.approx([score.logprob for score in exact], abs=1e-5)
        assert np.array_equal(made.routing.experts, expected.routing.experts)


def test_the_routing_is_the_full_forward_s():
    settings = [GenerationSettings(4, ignore_eos=True), GenerationSettings(0), GenerationSettings(7, temperature=1.0, ignore_eos=True)]
    run = jax.jit(lambda variables, tokens: MODEL.apply(variables, tokens, return_routing=True).routing)
    for prompt, made in zip(PROMPTS, moejax.generate(
        MODEL, VARIABLES, None, PROMPTS, [one.max_new_tokens for one in settings], [one.temperature for one in settings], True,
        return_details=True, return_routing=True,
    ), strict=True):  # fmt: skip
        read = (prompt + made.tokens)[: len(prompt) + max(len(made.tokens) - 1, 0)]
        exact = run(VARIABLES, np.pad(np.array([read], np.int32), ((0, 0), (0, 32 - len(read)))))
        assert made.routing.experts.shape == (len(read), 2, 2)
        assert np.array_equal(made.routing.experts, np.asarray(exact.experts)[:, 0, : len(read)].swapaxes(0, 1))
        np.testing.assert_allclose(made.routing.weights, np.asarray(exact.weights)[:, 0, : len(read)].swapaxes(0, 1), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [CacheConfig("window", window=40), CacheConfig("sinks", 3, 37)], ids=["window", "sinks"])
def test_a_cache_that_forgets_says_the_same_until_it_does(cache):
    engine = Engine(MODEL, VARIABLES, cache=cache, chunk=5)
    settings = GenerationSettings(60, ignore_eos=True)
    exact, made = Engine(MODEL, VARIABLES).generate(PROMPTS, settings), engine.generate(PROMPTS, settings)
    for prompt, whole, forgetful in zip(PROMPTS, exact, made, strict=True):
        before = 41 - len(prompt)  # the token after the one that fills the cache is the last that has seen all
        assert forgetful[:before] == whole[:before]
    assert made != exact
    for prompt, row in zip(PROMPTS, made, strict=True):
        assert engine.generate([prompt], settings) == [row], "no other program's sizes, and no row's, change what is seen"


@pytest.mark.slow
def test_int8_keeps_what_greedy_decoding_says_nearly():
    settings = GenerationSettings(8, logprobs=0, ignore_eos=True)
    exact = Engine(MODEL, VARIABLES).complete(PROMPTS, settings)
    for row, made in zip(exact, Engine(MODEL, VARIABLES, cache=CacheConfig(dtype="int8")).complete(PROMPTS, settings), strict=True):
        same = next((place for place in range(8) if row.tokens[place] != made.tokens[place]), 8)
        assert same >= 2
        found, known = ([score.logprob for score in one.logprobs[:same]] for one in (made, row))
        assert found == pytest.approx(known, abs=0.1)
        assert found != known


@pytest.mark.slow
def test_text_that_was_taken_is_forgotten():
    """So that a text without end needs no memory; what comes after it is what would have come."""
    settings = GenerationSettings(12, temperature=1.0, seed=3, ignore_eos=True, logprobs=0)
    (whole,) = Engine(SPEAKER, SPOKEN, tokenizer=TOKENIZER).complete([[5, 6]], settings)
    texts, most = [], 0
    for (made,) in Engine(SPEAKER, SPOKEN, tokenizer=TOKENIZER).follow([[5, 6]], settings):
        most = max(most, len(made.tokens), len(made.logprobs))
        texts.append(made.take())
    assert ("".join(texts), made.finish_reason, most) == (whole.text, "length", 1)


TEXTS = ["the router sends a token to an expert, and the expert sends it back\n" * 20]
TOKENIZER = train_tokenizer(TEXTS, 300)
SPEAKER = Transformer(dataclasses.replace(CONFIG, vocab_size=300))
SPOKEN = {"params": init_parameters(SPEAKER, jax.random.key(4))}


def test_text_ends_before_a_stop_string_wherever_tokens_are_cut():
    settings = GenerationSettings(20, temperature=1.0, seed=3, ignore_eos=True)
    (free,) = Engine(SPEAKER, SPOKEN, tokenizer=TOKENIZER).complete([[5, 6]], settings)
    assert free.text == TOKENIZER.decode(free.tokens, is_start=False)
    middle = len(free.text) // 2
    stop = free.text[middle - 2 : middle + 3]
    engine = Engine(SPEAKER, SPOKEN, tokenizer=TOKENIZER)
    rows = [dataclasses.replace(settings, stop=("never said", stop)), settings]
    shown = [""]
    for generations in engine.follow([[5, 6], [5, 6]], rows):
        stopped, other = generations
        assert stopped.text.startswith(shown[-1]), "what was shown is not taken back"
        shown.append(stopped.text)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert stop in TOKENIZER.decode(stopped.tokens, is_start=False)
    assert stop not in TOKENIZER.decode(stopped.tokens[:-1], is_start=False)
    assert (other.text, other.finish_reason) == (free.text, "length")


def test_stop_ids_end_a_row_also_where_eos_is_ignored():
    free = Engine(MODEL, VARIABLES).generate([PROMPTS[0]], GenerationSettings(12, ignore_eos=True))[0]
    settings = GenerationSettings(12, ignore_eos=True, stop_token_ids=(free[5],))
    (made,) = Engine(MODEL, VARIABLES).complete([PROMPTS[0]], settings)
    assert (made.tokens, made.finish_reason) == (free[: free.index(free[5])], "stop")


def test_layers_are_unstacked_where_that_is_cheap():
    engine = Engine(MODEL, VARIABLES)
    assert not engine.model.config.scan_layers
    assert set(engine.variables["params"]) == set(unstack_layers(VARIABLES["params"], CONFIG))
    deep = Transformer(dataclasses.replace(CONFIG, num_layers=17))
    assert Engine(deep, VARIABLES).model is deep


def test_weights_are_turned_where_that_is_cheap():
    def is_turned(leaf):
        return isinstance(leaf, InputMajor)

    params = Engine(MODEL, VARIABLES).variables["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_turned)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): is_turned(leaf) for path, leaf in leaves}
    assert names == {name: name.endswith("/kernel") and "/router/" not in name for name in names}
    assert sum(names.values()) > CONFIG.num_layers
    jax.tree.map(np.testing.assert_array_equal, as_output_major(params), unstack_layers(VARIABLES["params"], CONFIG))
    capacity = Transformer(dataclasses.replace(CONFIG, dispatch="capacity"))
    assert not any(map(is_turned, jax.tree.leaves(Engine(capacity, VARIABLES).variables["params"], is_leaf=is_turned)))


def test_a_turned_weight_of_another_model_is_refused_by_name():
    engine = Engine(MODEL, VARIABLES)
    engine.variables["params"]["layer_0"]["attention"]["query"]["kernel"] = InputMajor(jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"layer_0/attention/query has the shape \(5, 3\)"):
        engine.generate([[1, 2]], GenerationSettings(1))


def test_sizes_are_rounded_up_to_few():
    sizes = {round_up(number, 64) for number in range(1, 32_769)}
    assert all(number <= round_up(number, 64) <= max(number * 1.25, number + 63) for number in range(1, 5000))
    assert len(sizes) == 8 + 4 * 6
    engine = Engine(MODEL, VARIABLES)
    assert engine.shapes([3, 70, 9], [100, 1, 0]) == (4, 128, 128)
    assert [engine.shapes([length], [1])[1] for length in (1, 16, 17, 33, 65, 5000)] == [16, 16, 32, 64, 128, 512]
    assert Engine(MODEL, VARIABLES, bucket=256).shapes([3], [1]) == (1, 256, 256)
    assert Engine(MODEL, VARIABLES, cache=CacheConfig("sinks")).shapes([3, 70], [9, 9]) == (2, 128, 0)


@pytest.mark.slow
def test_shapes_compile_once_per_bucket():
    engine = Engine(Transformer(dataclasses.replace(CONFIG, max_length=4095)), VARIABLES)
    for prompt in ([1, 2, 3], [1] * 20, [1] * 50):
        engine.generate([prompt], GenerationSettings(4, ignore_eos=True))
    compiled = [program._cache_size() for program in PROGRAMS]
    for length in (1, 7, 20, 40):
        settings = GenerationSettings(5 + length % 3, temperature=length % 2, top_k=length, top_p=0.9, seed=length, ignore_eos=True)
        engine.generate([list(range(1, length + 1))], settings)
    assert compiled == [program._cache_size() for program in PROGRAMS]


@pytest.mark.parametrize(("prompts", "options", "message"), [
    ([[]], {}, "prompt 0 has no tokens"),
    ([[1], [50]], {}, "prompt 1 holds token 50, outside the model's vocabulary of 50"),
    ([[-1]], {}, "token -1"),
    (["text"], {}, "no tokenizer"),
    ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
    ([[1]], {"top_p": 0.0}, "top_p=0.0"),
    ([[1]], {"top_k": -2}, "top_k=-2"),
    ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1"),
    ([[1], [2]], {"min_p": [0.1, 2]}, "prompt 1: min_p=2"),
    ([[1], [2]], {"temperature": [0.1]}, "temperature is a list of 1 values, but there are 2 prompts"),
    ([[1]], {"temprature": 1.0}, "temprature is no option of generation; did you mean 'temperature'"),
    ([[1]], {"stop": "x"}, r"prompt 0: stop=\('x',\) is text, but there is no tokenizer"),
    ([[1]], {"logit_bias": {50: 1.0}}, "prompt 0: logit_bias names token 50"),
    ([[1]], {"logprobs": 1}, "return_details=True"),
    ([[1]], {"return_routing": True}, "return_details=True"),
])  # fmt: skip
def test_bad_requests_are_refused(prompts, options, message):
    with pytest.raises(UserError, match=message):
        moejax.generate(MODEL, VARIABLES, None, prompts, **options)


@pytest.mark.slow
def test_going_past_the_model_s_positions_warns():
    short = Transformer(dataclasses.replace(CONFIG, max_length=8))
    with pytest.warns(UserWarning, match="past the 8 positions"):
        Engine(short, VARIABLES).generate([[1, 2, 3]], GenerationSettings(6, ignore_eos=True))
