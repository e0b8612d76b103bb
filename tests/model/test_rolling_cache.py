"""Caches that forget, against a stream by hand: float64, all keys of all time kept without rotation, the kept ones gathered and turned."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.config import ModelConfig, UserError
from moejax.model.cache import create_cache
from moejax.model.positions import model_frequencies
from moejax.model.transformer import Transformer, abstract_parameters, unstack_layers
from moejax.rope_config import RopeScaling

SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=3, max_length=32,
    initializer_range=0.3, rope_scaling=RopeScaling("yarn", 4.0, 8),
)  # fmt: skip
LENGTH = 30


def random_variables(config, seed=0):
    random = np.random.default_rng(seed)
    leaves = abstract_parameters(config)
    return {"params": jax.tree.map(lambda a: jnp.asarray(random.normal(0.05, config.initializer_range, a.shape), a.dtype), leaves)}


def tokens_of(config, rows=2, length=LENGTH):
    return np.random.default_rng(1).integers(1, config.vocab_size, (rows, length), dtype=np.int32)


class StreamByHand:
    """One row of an Arctic model, token by token, in float64. `kept(t)` says which tokens query t sees (its own last), and where."""

    def __init__(self, config, variables, kept):
        self.config, self.kept = config, kept
        self.tree = jax.tree.map(lambda a: np.asarray(a, np.float64), unstack_layers(variables["params"], config))
        frequencies = model_frequencies(config, 0)
        self.radians, self.factor = frequencies.radians.astype(np.float64), frequencies.attention_factor
        self.past = [([], []) for _ in range(config.num_layers)]

    def norm(self, x, name, layer):
        scale = layer[name]["scale"]
        return x / np.sqrt(np.mean(x**2) + self.config.norm_epsilon) * scale

    def turn(self, x, positions):
        angles = np.asarray(positions)[:, None, None] * self.radians
        cos, sin = np.cos(angles) * self.factor, np.sin(angles) * self.factor
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def attention(self, x, weights, past, t):
        config = self.config
        split = lambda name, heads: (weights[name]["kernel"] @ x).reshape(1, heads, -1)  # noqa: E731
        for parts, name in zip(past, ("key", "value"), strict=True):
            parts.append(split(name, config.num_kv_heads)[0])
        tokens, positions = self.kept(t)
        keys = self.turn(np.stack([past[0][i] for i in tokens]), positions)
        values = np.stack([past[1][i] for i in tokens])
        query = self.turn(split("query", config.num_heads), positions[-1:])[0]
        out = []
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            scores = keys[:, group] @ query[head] / np.sqrt(config.head_width)
            share = np.exp(scores - scores.max())
            out.append(share / share.sum() @ values[:, group])
        return weights["out"]["kernel"] @ np.concatenate(out)

    def mlp(self, x, gate, up, down):
        gated = gate @ x
        return down @ (gated / (1 + np.exp(-gated)) * (up @ x))

    def step(self, token, t):
        config = self.config
        x = self.tree["embed"]["embedding"][token]
        for number, past in enumerate(self.past):
            layer = self.tree[f"layer_{number}"]
            after = x + self.attention(self.norm(x, "attention_norm", layer), layer["attention"], past, t)
            moe_in = self.norm(x, "moe_norm", layer)
            logits = layer["moe"]["router"]["kernel"] @ moe_in
            chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            chosen = np.argsort(-chances)[: config.experts_per_token]
            kernels = [layer["moe"][name]["kernel"] for name in ("gate", "up", "down")]
            moe = sum(chances[e] / chances[chosen].sum() * self.mlp(moe_in, *(kernel[e] for kernel in kernels)) for e in chosen)
            residual = (layer["residual"][name]["kernel"] for name in ("gate", "up", "down"))
            x = after + self.mlp(self.norm(after, "residual_norm", layer), *residual) + moe
        return self.tree["head"]["kernel"] @ self.norm(x, "final_norm", self.tree)

    def stream(self, tokens):
        return np.stack([self.step(token, t) for t, token in enumerate(tokens)])


def keep(sinks, window):
    """The first S tokens and the last R, the query's own among them, at 0, 1, 2, ... in the cache."""

    def kept(t):
        tokens = [*range(min(sinks, t + 1)), *range(max(sinks, t - window + 1), t + 1)]
        return tokens, np.arange(len(tokens))

    return kept


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def advance(model, variables, tokens, mask, cache):
    out = model.apply(variables, tokens, mask=mask, cache=cache)
    return out.logits, out.cache


def read_in_chunks(model, variables, tokens, cache, chunk):
    """Logits of every token, the rows read at different paces: the second takes one token fewer of every second chunk."""
    done, logits, turn = np.zeros(len(tokens), int), np.zeros((*tokens.shape, model.config.vocab_size)), 0
    while (done < tokens.shape[1]).any():
        counts = np.minimum(tokens.shape[1] - done, [chunk, chunk - (turn % 2 if chunk > 1 else 0)])
        part, mask = np.zeros((2, chunk), np.int32), np.zeros((2, chunk), np.int32)
        for row, count in enumerate(counts):
            part[row, :count], mask[row, :count] = tokens[row, done[row] : done[row] + count], 1
        out, cache = advance(model, variables, part, mask, cache)
        for row, count in enumerate(counts):
            logits[row, done[row] : done[row] + count] = out[row, :count]
        done, turn = done + counts, turn + 1
    assert np.asarray(cache.lengths).tolist() == done.tolist()
    return logits, cache


MODEL = Transformer(SMALL)


@pytest.fixture(scope="module")
def variables():
    return random_variables(SMALL)


@functools.cache
def by_hand(sinks, window):
    values = random_variables(SMALL)
    return np.stack([StreamByHand(SMALL, values, keep(sinks, window)).stream(row) for row in tokens_of(SMALL)])


SLOW = [(2, 5, 3), (3, 1, 4), (0, 4, 1), (0, 4, 6)]
STREAMS = [(2, 5, 1), (2, 5, 11), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in SLOW)]


@pytest.mark.parametrize(("sinks", "window", "chunk"), STREAMS)
def test_any_chunk_is_the_stream_by_hand(variables, sinks, window, chunk):
    """Also before the cache is full, which is a part of every stream; chunks that hold more than the window too."""
    cache = create_cache(SMALL, 2, 1, kind="sinks", sinks=sinks, window=window)
    shape = cache.keys.shape
    ours, cache = read_in_chunks(MODEL, variables, tokens_of(SMALL), cache, chunk)
    assert cache.keys.shape == shape == (2, 2, sinks + window, 2, 8)
    np.testing.assert_allclose(ours, by_hand(sinks, window), atol=2e-4)


def test_until_it_is_full_a_cache_with_sinks_is_the_full_one(variables):
    tokens = tokens_of(SMALL)[:, :16]
    full, _ = advance(MODEL, variables, tokens, np.ones_like(tokens), create_cache(SMALL, 2, 16))
    ours, _ = advance(MODEL, variables, tokens, np.ones_like(tokens), create_cache(SMALL, 2, 1, kind="sinks", sinks=4, window=12))
    np.testing.assert_allclose(ours, full, atol=2e-5)
    np.testing.assert_allclose(full[:, :5], by_hand(2, 5)[:, :5], atol=2e-4)
    assert np.abs(full[:, 15] - by_hand(2, 5)[:, 15]).max() > 1e-2, "forgetting changes something"


@pytest.mark.parametrize("chunk", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_the_rolling_window_is_the_models_own_window(variables, chunk):
    """Absolute positions and a mask in the full cache, positions in the ring here: a rotation depends on distances alone."""
    model = Transformer(dataclasses.replace(SMALL, attention_window=4))
    tokens = tokens_of(SMALL)
    expected, _ = advance(model, variables, tokens, np.ones_like(tokens), create_cache(model.config, 2, LENGTH))
    cache = create_cache(model.config, 2, 1, kind="window")
    assert (cache.capacity, cache.window, cache.sinks) == (4, 4, 0)
    ours, _ = read_in_chunks(model, variables, tokens, cache, chunk)
    np.testing.assert_allclose(ours, expected, atol=5e-5)


@pytest.mark.parametrize(("sinks", "window", "chunk"), [(2, 5, 1), (2, 5, 11), pytest.param(0, 4, 6, marks=pytest.mark.slow)])
def test_the_same_contents_give_the_same_logits_after_ten_million_tokens(variables, sinks, window, chunk):
    empty, random = create_cache(SMALL, 2, 1, kind="sinks", sinks=sinks, window=window), np.random.default_rng(3)
    keys, values = random.normal(size=(2, *empty.keys.shape)).astype(np.float32)
    tokens, mask, results = tokens_of(SMALL)[:, :chunk], np.ones((2, chunk), np.int32), []
    for length in (1_000, 10_000_000, 2_000_000_000):
        lengths = jnp.full(2, length + (sinks - length) % window, jnp.int32)  # the same slot of the ring is the oldest
        cache = dataclasses.replace(empty, keys=jnp.asarray(keys), values=jnp.asarray(values), lengths=lengths)
        results.append(advance(MODEL, variables, tokens, mask, cache)[0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_a_step_works_in_the_memory_it_is_given(variables):
    """The cache that comes out lies where the one that went in lay, for ever: no step costs more than the first."""
    cache = create_cache(SMALL, 2, 1, kind="sinks", sinks=2, window=5)
    tokens = tokens_of(SMALL)[:, :1]

    @functools.partial(jax.jit, donate_argnums=(1, 2, 3))
    def step(tokens, keys, values, lengths):
        out = MODEL.apply(variables, tokens, cache=dataclasses.replace(cache, keys=keys, values=values, lengths=lengths)).cache
        return out.keys, out.values, out.lengths

    donated = step.lower(tokens, cache.keys, cache.values, cache.lengths).compile().memory_analysis().alias_size_in_bytes
    assert donated >= 2 * cache.keys.nbytes + cache.lengths.nbytes


def sink_cache_of_the_reference(size, sinks):
    """transformers' SinkCache, spec'd by what it does: a key's position moves back by one at every eviction, and once too early.

    When the cache holds size - 1 tokens and one more comes, nothing has to go, but the kept ones move all the same: the first recent key
    then has the last sink's position, and a hole is left before the newest, until the tokens around it are gone.
    """
    tokens, positions, views = [], [], {}

    def kept(t):
        if t not in views:
            if len(tokens) + 1 >= size:
                gone = len(tokens) + 1 - size
                recent = range(sinks + gone, len(tokens))
                moved = [*positions[:sinks], *(positions[i] - 1 for i in recent)]
                tokens[:], positions[:] = [*tokens[:sinks], *(tokens[i] for i in recent)], moved
            tokens.append(t)
            positions.append(min(t, size - 1))
            views[t] = list(tokens), np.array(positions)
        return views[t]

    return kept


def test_the_reference_sink_cache(golden):
    """Its stream by hand, quirk and all; ours is the same until the quirk, and is the stream by hand without it."""
    reference = golden("arctic_sinkcache")
    model, variables, _ = moejax.load(reference.directory, dtype="float32")
    size, sinks = (reference.meta["sink"][name] for name in ("window_length", "num_sink_tokens"))
    prompt = reference.inputs["input_ids"][0, : reference.inputs["attention_mask"][0].sum()]
    tokens = np.concatenate([prompt, reference.expected["sink_greedy_tokens"][0][:-1]])
    expected = reference.expected["sink_logits_0"]
    theirs = StreamByHand(model.config, variables, sink_cache_of_the_reference(size, sinks)).stream(tokens)
    np.testing.assert_allclose(theirs, expected, atol=2e-4)
    cache = create_cache(model.config, 1, 1, kind="sinks", sinks=sinks, window=size - sinks)
    ours = np.asarray(advance(model, variables, tokens[None], np.ones((1, len(tokens)), np.int32), cache)[0][0])
    np.testing.assert_allclose(ours[: size - 1], expected[: size - 1], atol=2e-4)
    assert np.abs(ours[size - 1] - expected[size - 1]).max() > 1e-3
    np.testing.assert_allclose(ours, StreamByHand(model.config, variables, keep(sinks, size - sinks)).stream(tokens), atol=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ring"}, "cache.kind='ring' is unknown; expected one of full, window, sinks"),
        ({"window": 8}, "cache.window=8 says nothing to cache.kind='full'"),
        ({"kind": "window", "window": 0}, "cache.window=0 make no cache"),
        ({"kind": "sinks", "sinks": -1}, "cache.sinks=-1 and cache.window=None make no cache"),
        ({"kind": "sinks", "sinks": 32}, "cache.sinks=32 leaves no window of the 32 positions of this model"),
    ],
)
def test_sizes_that_make_no_cache_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        create_cache(SMALL, 2, 8, **options)


def test_positions_belong_to_the_cache(variables):
    tokens = tokens_of(SMALL)
    with pytest.raises(ValueError, match="positions are those in the cache"):
        MODEL.apply(variables, tokens, positions=np.zeros_like(tokens), cache=create_cache(SMALL, 2, 1, kind="sinks"))
