"""Meshes weighed for serving: bytes by hand, and which one is taken."""

from __future__ import annotations

import dataclasses
import math

import jax
import jaxtyping
import pytest

from moejax.cache_config import CacheConfig
from moejax.config import MeshConfig, UserError
from moejax.families.arctic import ARCTIC_480B
from moejax.families.mixtral import MIXTRAL_8X7B
from moejax.serving.plan_meshes import candidate_meshes, choose_mesh, nearest_meshes, open_mesh, weigh_mesh

ONE = MeshConfig(fsdp=1)
# Arctic, parameters of a layer: query and out, key and value, the dense residual, the router, one expert.
ATTENTION, DENSE, ROUTER, EXPERT = 2 * 7168 * 7168 + 2 * 7168 * 1024, 3 * 7168 * 7168, 7168 * 128, 3 * 7168 * 4864
TABLE = 32_000 * 7168
NORMS = 35 * 3 * 7168 + 7168
CACHE = 2 * 35 * 8 * 128 * 2  # bytes a token


@pytest.fixture(autouse=True)
def unchecked():
    """Without the checks of types at every call: a cache of shapes has no arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def weigh(config=ARCTIC_480B, batch=64, context=4096, cache=CacheConfig(), **axes):  # noqa: B008
    return weigh_mesh(config, open_mesh(config, MeshConfig(**{"fsdp": 1, **axes}), jax.devices()), batch, context, cache)


def touched(tokens):
    return 128 * (1 - (1 - 2 / 128) ** tokens)


def test_arctic_over_experts_and_tensor_by_hand():
    """Experts are divided by eight, the rest by the four of tensor; norms and routers lie on every device."""
    load = weigh(expert=2, tensor=4)
    divided = 35 * (ATTENTION + DENSE) + TABLE
    assert load.weights == 2 * (35 * 128 * EXPERT // 8 + (divided + TABLE) // 4 + 35 * ROUTER + NORMS)
    assert load.cache == 64 * 4096 * CACHE // 8 + 64 * 4
    assert load.read_cache == 64 * 4096 * CACHE / 8
    assert load.read_weights == pytest.approx(2 * (35 * touched(64) * EXPERT / 8 + divided / 4 + 35 * ROUTER + NORMS))
    everything = 2 * (35 * touched(64) * EXPERT + divided + 35 * ROUTER + NORMS) + 64 * 4096 * CACHE
    assert load.spread == pytest.approx(everything / 8)


def test_copies_of_the_model_meet_their_own_part_of_the_batch():
    whole, halves = weigh(tensor=8), weigh(data=2, tensor=4)
    expert_bytes = 2 * 35 * EXPERT
    rest = whole.read_weights - touched(64) * expert_bytes / 8
    assert rest == pytest.approx(2 * ((35 * (ATTENTION + DENSE) + TABLE) / 8 + 35 * ROUTER + NORMS))
    assert halves.read_weights == pytest.approx(2 * rest - 2 * (35 * ROUTER + NORMS) + touched(32) * expert_bytes / 4)
    assert weigh(data=2, tensor=4, batch=63).read_weights > halves.read_weights  # rows that are not divided are on both


def test_a_cache_in_int8_and_one_that_forgets():
    full, small, window = (
        weigh(cache=one, tensor=8) for one in (CacheConfig(), CacheConfig(dtype="int8"), CacheConfig("window", window=1024))
    )
    assert small.read_cache == full.read_cache * (128 + 4) / 256  # a byte a number and a float32 a vector
    assert window.read_cache == full.read_cache / 4
    assert weigh(cache=CacheConfig("window", window=1024), context=512, tensor=8).read_cache == window.read_cache / 2  # not full yet


def test_no_candidate_divides_weights_over_fsdp():
    found = candidate_meshes(ARCTIC_480B, 64)
    assert {(one.expert, one.tensor) for one in found} >= {(8, 8), (64, 1), (16, 4), (1, 8)}
    for one in found:
        assert one.fsdp == 1 and math.prod(dataclasses.astuple(one)) == 64 and 8 % one.tensor == 0 and 128 % one.expert == 0


def test_the_mesh_that_reads_least_is_chosen_of_those_that_hold_the_model():
    config = dataclasses.replace(MIXTRAL_8X7B, dtype="bfloat16", param_dtype="bfloat16")
    weights = weigh(config, 8, tensor=8).weights
    assert choose_mesh(config, jax.devices(), 8, 4096, CacheConfig(), None) == MeshConfig(fsdp=1, tensor=8)
    loads = {one.tensor: weigh(config, 8, data=one.data, expert=one.expert, tensor=one.tensor) for one in candidate_meshes(config, 8)}
    assert choose_mesh(config, jax.devices(), 8, 4096, CacheConfig(), weights / 100) == MeshConfig(fsdp=1, tensor=8)  # none holds it
    assert min(loads.values(), key=lambda one: one.held).weights == weights


def test_the_nearest_mesh_is_the_fewest_doublings_away():
    config = dataclasses.replace(MIXTRAL_8X7B, dtype="bfloat16", param_dtype="bfloat16")
    asked = open_mesh(config, MeshConfig(data=4, fsdp=1, tensor=2), jax.devices())
    room = weigh(config, 8, 512, data=2, tensor=4).held + 1
    names = [(one.data, one.expert, one.tensor) for one, load in nearest_meshes(config, asked, 8, 512, CacheConfig(), room)]
    doublings = [abs(math.log2(data / 4)) + math.log2(expert) + abs(math.log2(tensor / 2)) for data, expert, tensor in names]
    assert names[0] == (2, 1, 4) and doublings == sorted(doublings)
    assert (1, 1, 8) in names and (4, 1, 2) not in names and (8, 1, 1) not in names
    assert nearest_meshes(config, asked, 8, 512, CacheConfig(), 0.0) == []


def test_a_mesh_that_the_model_does_not_fit():
    with pytest.raises(UserError, match=r"mesh.tensor=16|takes 16 devices"):
        open_mesh(ARCTIC_480B, MeshConfig(fsdp=1, tensor=16), jax.devices())
