"""Parameter counts of the published models, to the last digit."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from moejax.families.arctic import ARCTIC_480B
from moejax.families.counts import count_parameters, expect_touched
from moejax.families.layout import abstract_parameters
from moejax.families.mixtral import MIXTRAL_8X7B, MIXTRAL_8X22B

PUBLISHED = [
    (MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248),
    (MIXTRAL_8X22B, 140_630_071_296, 39_161_468_928),
    (dataclasses.replace(MIXTRAL_8X22B, vocab_size=32_000), 140_620_634_112, 39_152_031_744),
    (ARCTIC_480B, 478_584_608_768, 17_318_647_808),
    (dataclasses.replace(ARCTIC_480B, num_kv_heads=56), 481_667_422_208, None),
]


@pytest.mark.parametrize(("config", "total", "active"), PUBLISHED)
def test_counts_equal_the_published_models(config, total, active):
    counts = count_parameters(config)
    assert counts.total == total
    assert active is None or counts.active == active
    assert counts.bytes == 2 * total  # the presets are bfloat16
    assert sum(kind.total for kind in counts.by_kind.values()) == total
    assert sum(kind.active for kind in counts.by_kind.values()) == counts.active
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_parameters(config))) == total


def test_counts_by_kind_of_arctic():
    by_kind = count_parameters(ARCTIC_480B).by_kind
    assert list(by_kind) == ["embedding", "attention", "router", "experts", "residual_mlp", "norms", "head"]
    assert by_kind["experts"].total == 128 * 3_660_840_960
    assert by_kind["experts"].active == 2 * 3_660_840_960
    assert by_kind["router"].total == 32_112_640
    dense = sum(kind.total for name, kind in by_kind.items() if name not in ("experts", "router"))
    assert dense == 9_964_853_248


def test_biases_count_with_the_router_and_are_float32():
    plain, biased = count_parameters(ARCTIC_480B), count_parameters(dataclasses.replace(ARCTIC_480B, router_bias=True))
    assert biased.total - plain.total == biased.active - plain.active == 35 * 128
    assert biased.by_kind["router"].total == plain.by_kind["router"].total + 35 * 128
    assert biased.bytes - plain.bytes == biased.by_kind["router"].bytes - plain.by_kind["router"].bytes == 4 * 35 * 128


def test_dense_layers_and_tied_embeddings_are_counted_once():
    config = dataclasses.replace(ARCTIC_480B, moe_every=2, num_layers=5, tie_embeddings=True, param_dtype="float32")
    counts = count_parameters(config)
    assert "head" not in counts.by_kind
    assert counts.by_kind["dense_mlp"].total == 3 * 3 * 7168 * 4864  # layers 0, 2 and 4
    assert counts.by_kind["residual_mlp"].total == 2 * 3 * 7168 * 7168  # layers 1 and 3
    assert counts.bytes == 4 * counts.total


@pytest.mark.parametrize(("rows", "experts", "expected"), [(1, 128, 2.0), (8, 128, 15.2), (64, 128, 81.3), (4, 8, 5.5), (16, 8, 7.9)])
def test_experts_touched_by_uniform_routing(rows, experts, expected):
    assert expect_touched(dataclasses.replace(ARCTIC_480B, num_experts=experts), rows) == pytest.approx(expected, abs=0.06)
