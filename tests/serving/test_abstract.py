"""What serving's programs are given, as shapes: the same as what they are given, lying where it lies."""

from __future__ import annotations

import jax
import jaxtyping
import numpy as np
import pytest

from moejax.cache_config import CacheConfig
from moejax.config import ModelConfig
from moejax.generation_config import GenerationSettings
from moejax.model.cache import create_cache
from moejax.model.transformer import Transformer
from moejax.serving import engine
from moejax.serving.abstract import abstract_cache, abstract_variables, bytes_per_device, decode_inputs
from moejax.serving.decoding import Details
from moejax.sharding import make_mesh

TINY = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=4, max_length=64
)


@pytest.fixture
def unchecked():
    """Without the checks of types at every call: a cache of shapes has no arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def describe(tree):
    return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize(
    "cache", [CacheConfig(), CacheConfig("full", dtype="int8"), CacheConfig("sinks", 4, 12)], ids=lambda one: f"{one.kind} {one.dtype}"
)
def test_a_cache_lies_as_one_that_is_there(unchecked, cache):
    mesh = make_mesh(data=2, fsdp=1, expert=2, tensor=2)
    real = create_cache(TINY, 8, 32, mesh, cache.kind, cache.sinks, cache.window, cache.dtype)
    shapes = abstract_cache(TINY, mesh, 8, 32, cache)
    assert describe(shapes) == describe(real)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(real), strict=True):
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)
    assert bytes_per_device(shapes) == sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(real))


def test_decode_is_given_what_the_engine_gives_it(unchecked, monkeypatch):
    """The arguments of the engine's own call, and those that a plan is lowered with."""
    mesh = make_mesh(data=2, fsdp=1, expert=2, tensor=2)
    variables = abstract_variables(TINY, mesh)
    given = []

    def look(model, asked, *arguments):
        given.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(engine, "prefill", lambda *arguments: (None, arguments[4], Details()))
    monkeypatch.setattr(engine, "choose_first", lambda *_: (np.zeros(8, np.int32), np.ones(8, bool), None, None))
    monkeypatch.setattr(engine, "decode", look)
    with pytest.raises(InterruptedError):
        engine.Engine(Transformer(TINY, mesh), variables).generate([[1, 2, 3]] * 8, GenerationSettings(5))
    planned = decode_inputs(mesh, variables, abstract_cache(TINY, mesh, 8, 64, CacheConfig()), 8)
    assert describe(planned) == describe(given[0])
