"""The FLOP of a step, against a count by hand and against what XLA counts in the compiled program."""

import dataclasses

import pytest

from moejax.bench.train import PEER_SHAPE
from moejax.families.flops import count_flops


def test_flops_are_those_counted_by_hand():
    """Per token and layer: q and o 256x256, k and v 256x64, router 256x8, two experts of three 256x896; once the head 256x32000."""
    per_layer = 2 * 256 * 256 + 2 * 256 * 64 + 256 * 8 + 2 * 3 * 256 * 896
    matmuls = 6 * (4 * per_layer + 256 * 32000)
    attention = 3 * 4 * (2 * 2 * 256) * (257 / 2)  # scores and mixing, 256 wide over all heads, half of the square
    assert count_flops(PEER_SHAPE, 8, 256) == pytest.approx(8 * 256 * (matmuls + attention))
    assert count_flops(PEER_SHAPE, 8, 256) == pytest.approx(0.183e12, rel=0.02)


def test_every_part_is_counted():
    def flops(**changes):
        return count_flops(dataclasses.replace(PEER_SHAPE, **changes), 8, 256)

    assert flops() == 8 * count_flops(PEER_SHAPE, 1, 256)
    assert flops(num_experts=16) - flops() == 6 * 8 * 256 * 4 * 8 * 256  # more experts: a wider router, and nothing else
    assert flops(experts_per_token=3) - flops() == 6 * 8 * 256 * 4 * 3 * 256 * 896
    assert flops(tie_embeddings=True) == flops()  # the head multiplies, whoever owns it
    assert flops(residual_mlp=True) - flops() == 6 * 8 * 256 * 4 * 3 * 256 * 256
    assert flops(remat="full", dtype="bfloat16", attention_window=16) == flops()
