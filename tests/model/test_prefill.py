"""A prompt in chunks is the prompt in one pass, for every kind of cache and rows of any lengths; the decoding behind it too."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.config import ModelConfig
from moejax.model.cache import create_cache
from moejax.model.partition import parameter_shardings
from moejax.model.prefill import prefill_in_chunks, read_chunk
from moejax.model.transformer import Transformer, abstract_parameters

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=3, initializer_range=0.3
)
KINDS = {
    "full": {"kind": "full"},
    "window": {"kind": "window", "window": 6},
    "sinks": {"kind": "sinks", "sinks": 2, "window": 5},
}
LENGTHS = np.array([13, 5, 1, 9])
TOKENS = np.random.default_rng(0).integers(1, 64, (4, 14), dtype=np.int32)


@pytest.fixture(scope="module")
def variables():
    random = np.random.default_rng(0)
    return {"params": jax.tree.map(lambda a: jnp.asarray(random.normal(0.05, 0.3, a.shape), a.dtype), abstract_parameters(CONFIG))}


@functools.partial(jax.jit, static_argnums=0)
def decode(model, variables, tokens, cache):
    return model.apply(variables, tokens[:, None], cache=cache).logits


def read(model, variables, kind, chunk, mesh=None):
    cache = create_cache(CONFIG, 4, 24, mesh, **KINDS[kind])
    logits, cache = prefill_in_chunks(model, variables, TOKENS, LENGTHS, cache, chunk)
    assert np.asarray(cache.lengths).tolist() == LENGTHS.tolist()
    return np.concatenate([logits, decode(model, variables, TOKENS[:, 0], cache)[:, 0]])


@pytest.mark.parametrize("kind", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("window", "sinks"))])
def test_chunks_are_one_pass(variables, kind):
    model, variables = Transformer(CONFIG), jax.device_put(variables, jax.devices()[0])  # as `moejax.load` places them
    expected, before = read(model, variables, kind, 14), read_chunk._cache_size()
    np.testing.assert_allclose(read(model, variables, kind, 4), expected, atol=5e-5)
    assert read_chunk._cache_size() == before + 1, "chunks of one size are one program"


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_mesh_changes_nothing(variables, kind):
    mesh = moejax.make_mesh(data=2, fsdp=2, tensor=2)
    model = Transformer(CONFIG, mesh)
    placed = jax.device_put(variables, {"params": parameter_shardings(CONFIG, mesh)})
    np.testing.assert_allclose(read(model, placed, kind, 4, mesh), read(Transformer(CONFIG), variables, kind, 4), atol=5e-5)


def test_a_row_without_tokens_has_no_logits_and_leaves_its_cache_alone(variables):
    cache = create_cache(CONFIG, 4, 24, **KINDS["sinks"])
    logits, cache = prefill_in_chunks(Transformer(CONFIG), variables, TOKENS, np.array([3, 0, 4, 0]), cache, 4)
    assert not logits[1].any() and logits[0].any()
    assert not cache.keys[:, 1].any() and cache.keys[:, 0].any()
