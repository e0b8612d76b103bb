"""int8 keys and values: no entry off by more than half a scale, a quarter of float32's memory, and nearly the same logits."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.config import ModelConfig
from moejax.model.cache import create_cache
from moejax.model.cache_storage import Int8Vectors, create_stored, pass_through, quantize_vectors, read_stored, write_stored
from moejax.model.transformer import Transformer, init_parameters

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=3, initializer_range=0.2
)
MODEL = Transformer(CONFIG)
TOKENS = np.random.default_rng(1).integers(1, 64, (2, 12), dtype=np.int32)


def test_no_entry_is_off_by_more_than_half_a_scale():
    vectors = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32) * np.logspace(-6, 6, 50)[:, None].astype(np.float32)
    vectors[7] = 0.0
    stored = quantize_vectors(jnp.asarray(vectors))
    again = np.asarray(stored.whole, np.float32) * np.asarray(stored.scale)[:, None]
    largest = np.abs(vectors).max(axis=1)
    np.testing.assert_allclose(stored.scale, largest / 127, rtol=1e-6)
    assert np.all(np.abs(again - vectors) <= largest[:, None] / 127 * 0.5001)
    assert not again[7].any()
    assert np.array_equal(np.abs(np.asarray(stored.whole)).max(axis=1), np.where(largest > 0, 127, 0))


def test_what_is_written_is_read_and_nothing_else_changes():
    stored = create_stored((2, 3, 5, 2, 8), "float32", "int8", None)
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 8)), jnp.float32)
    where = (1, jnp.arange(3)[:, None], jnp.array([[0, 4], [2, 9], [9, 1]]))  # slot 9 is not there
    written = write_stored(stored, where, vectors)
    read = np.array(read_stored(written, 1, jnp.float32))
    kept = np.asarray(pass_through(stored, vectors))
    for row, slot, token in ((0, 0, 0), (0, 4, 1), (1, 2, 0), (2, 1, 1)):
        assert np.array_equal(read[row, slot], kept[row, token])
        read[row, slot] = 0.0
    assert not read.any()
    assert not np.asarray(read_stored(written, 0, jnp.float32)).any()


@pytest.mark.parametrize("kind", [{"kind": "full"}, pytest.param({"kind": "sinks", "sinks": 2, "window": 6}, marks=pytest.mark.slow)])
def test_logits_are_nearly_those_of_the_whole_numbers_and_chunks_are_tokens(kind):
    variables = {"params": init_parameters(MODEL, jax.random.key(0))}
    run = jax.jit(lambda variables, tokens, cache: (out := MODEL.apply(variables, tokens, cache=cache)) and (out.logits, out.cache))
    exact, _ = run(variables, TOKENS, create_cache(CONFIG, 2, 16, **kind))
    cache = create_cache(CONFIG, 2, 16, **kind, dtype="int8")
    assert isinstance(cache.keys, Int8Vectors)
    near, _ = run(variables, TOKENS, cache)
    spread = float(jnp.std(exact))
    assert 0.0 < float(jnp.max(jnp.abs(near - exact))) < 0.1 * spread
    singly = []
    for place in range(TOKENS.shape[1]):
        logits, cache = run(variables, TOKENS[:, place : place + 1], cache)
        singly.append(logits)
    np.testing.assert_allclose(np.concatenate(singly, axis=1), near, atol=1e-2 * spread)


def test_it_takes_a_byte_a_number_and_lies_on_a_mesh_as_the_others_do():
    mesh = moejax.make_mesh(data=2, fsdp=2, tensor=2)
    whole, small = (create_cache(CONFIG, 4, 16, mesh, dtype=dtype).keys for dtype in ("model", "int8"))
    assert small.whole.sharding.spec == whole.sharding.spec
    assert small.shape == whole.shape
    assert small.scale.addressable_shards[0].data.size * 8 == small.whole.addressable_shards[0].data.size
    assert small.whole.nbytes + small.scale.nbytes == whole.nbytes * (8 + 4) // (8 * 4)
