"""The step benchmark: its FLOP count by hand, and its JSON."""

import json

import pytest

from moejax.bench.train import PEER_SHAPE, count_flops
from tests.conftest import run_command


def test_flops_are_those_counted_by_hand():
    """Per token and layer: q and o 256x256, k and v 256x64, router 256x8, two experts of three 256x896; once the head 256x32000."""
    per_layer = 2 * 256 * 256 + 2 * 256 * 64 + 256 * 8 + 2 * 3 * 256 * 896
    matmuls = 6 * (4 * per_layer + 256 * 32000)
    attention = 3 * 4 * (2 * 2 * 256) * (257 / 2)  # scores and mixing, 256 wide over all heads, half of the square
    assert count_flops(PEER_SHAPE, 8, 256) == pytest.approx(8 * 256 * (matmuls + attention))
    assert count_flops(PEER_SHAPE, 8, 256) == pytest.approx(0.183e12, rel=0.02)


def test_json_is_all_that_is_printed():
    small = ["--model.vocab-size", "64", "--model.hidden-size", "32", "--model.intermediate-size", "32", "--model.num-layers", "1"]
    result = run_command(["python", "-m", "moejax.bench", "train", *small, "--sequence-length", "16", "--repeats", "2", "--json", "-"])
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert {"tokens_per_second", "flops_per_second", "fraction_of_ceiling", "compile_seconds", "jax", "device"} <= values.keys()
    assert 0 < values["fraction_of_ceiling"] < 2


def test_an_unknown_benchmark_is_refused():
    result = run_command(["python", "-m", "moejax.bench", "nothing"])
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected" in result.stderr
    assert "train" in result.stderr
