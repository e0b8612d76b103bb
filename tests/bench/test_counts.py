"""FLOP and bytes, against counts by hand."""

from __future__ import annotations

import dataclasses

import pytest

from moejax.bench.counts import (
    count_decode_bytes,
    count_decode_flops,
    count_layer_bytes,
    count_layer_flops,
    count_prefill_flops,
)
from moejax.bench.shape import PEER_SHAPE
from moejax.families.counts import expect_touched
from moejax.families.mixtral import MIXTRAL

ATTENTION = 2 * 256 * 256 + 2 * 256 * 64  # q and o, k and v
EXPERT = 3 * 256 * 896
HEAD = 32000 * 256


def test_a_layer():
    assert count_layer_flops(PEER_SHAPE, 2048, 4096) == 2 * 4096 * EXPERT + 2 * 2048 * 256 * 8
    assert count_layer_bytes(PEER_SHAPE, 2048, 5) == 4 * (5 * EXPERT + 8 * 256 + 2 * 2048 * 256)
    half = dataclasses.replace(PEER_SHAPE, dtype="bfloat16")
    assert count_layer_bytes(PEER_SHAPE, 2048, 5) - count_layer_bytes(half, 2048, 5) == 2 * 2 * 2048 * 256


def test_prefill_applies_the_head_once_a_row():
    layer = ATTENTION + 8 * 256 + 2 * EXPERT
    attention = 4 * 4 * 256 * (16 * 17 // 2)  # four layers, scores and mixing, half of the square
    assert count_prefill_flops(PEER_SHAPE, 3, 16) == 3 * (2 * 4 * layer * 16 + attention + 2 * HEAD)


def test_a_decoding_step():
    layer = ATTENTION + 8 * 256 + 2 * EXPERT
    assert count_decode_flops(PEER_SHAPE, 2, 40) == pytest.approx(2 * (2 * (4 * layer + HEAD) + 4 * 4 * 256 * 40))
    parts = count_decode_bytes(PEER_SHAPE, 8, 40, 7.25)
    assert parts == {
        "attention": 4 * 4 * ATTENTION,
        "router": 4 * 4 * 8 * 256,
        "experts": 4 * 4 * 7.25 * EXPERT,
        "head": 4 * HEAD,
        "keys_and_values": 4 * 2 * 4 * 8 * 40 * 2 * 32,
    }
    residual = count_decode_bytes(dataclasses.replace(PEER_SHAPE, residual_mlp=True), 8, 40, 7.25)
    assert residual.items() - parts.items() == {("residual_mlp", 4 * 4 * 3 * 256 * 256)}


def test_mixtral_reads_12_75_billion_parameters_a_token():
    config = dataclasses.replace(MIXTRAL.presets["mixtral_8x7b"], dtype="bfloat16", param_dtype="bfloat16")
    parts = count_decode_bytes(config, 1, 1, expect_touched(config, 1))
    assert (sum(parts.values()) - parts["keys_and_values"]) / 2 == pytest.approx(12.75e9, rel=1e-3)
    assert parts["keys_and_values"] == 131_072
