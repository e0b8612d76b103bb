"""The benchmark of prefill: figures that hang together, and shapes that are none."""

from __future__ import annotations

import pytest

from moejax.bench import prefill
from moejax.bench.counts import count_prefill_flops
from moejax.config import UserError
from tests.bench.conftest import SMALL


@pytest.mark.slow
def test_its_figures_hang_together(run_benchmark):
    result = run_benchmark(prefill, prefill.Arguments(model=SMALL, prompts=("1x9",), repeats=2))
    (row,) = result["rows"]
    assert row["name"] == "1 x 9"
    assert row["tokens_per_second"] * row["seconds"] == pytest.approx(9)
    assert row["flops_per_second"] * row["seconds"] == pytest.approx(count_prefill_flops(SMALL, 1, 9))


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x8", "8x-1", "8x8x8"])
def test_a_shape_that_is_none(text):
    with pytest.raises(UserError, match=f"prompts has '{text}'; expected BATCHxLENGTH"):
        prefill.Arguments(prompts=("1x1", text))
