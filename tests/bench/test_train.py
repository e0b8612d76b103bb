"""The step benchmark: its JSON, and names that are none."""

from __future__ import annotations

import pytest

from moejax.bench import train
from moejax.families.flops import count_flops
from tests.bench.conftest import SMALL
from tests.conftest import run_command


def test_its_figures_hang_together(run_benchmark):
    result = run_benchmark(train, train.Arguments(model=SMALL, batch_size=3, sequence_length=16, repeats=2))
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(3 * 16)
    assert result["flops_per_second"] * result["seconds"] == pytest.approx(count_flops(SMALL, 3, 16))
    assert result["compile_seconds"] > 0 and result["temporary_bytes"] > 0 and result["num_experts"] == 8
    assert result["parameters"] == 2 * 64 * 32 + 3 * 32 + 2 * (32 * 32 + 16 * 32) + 8 * 32 + 8 * 3 * 32 * 48


def test_an_unknown_benchmark_is_refused():
    result = run_command(["python", "-m", "moejax.bench", "nothing"])
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected" in result.stderr
    assert "train" in result.stderr
