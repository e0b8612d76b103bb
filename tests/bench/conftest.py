"""What tests of benchmarks share: ceilings of no size, and a run's JSON."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest

from moejax.bench.measure import Ceilings
from moejax.bench.output import COMMON
from moejax.bench.shape import PEER_SHAPE

SMALL = dataclasses.replace(PEER_SHAPE, vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, head_size=8)
VERSIONS = {"python", "moejax", "jax", "jaxlib", "flax", "device", "large_pages", "date"}


@pytest.fixture
def run_benchmark(monkeypatch, capsys):
    """(module, arguments) -> the JSON that the benchmark prints, with ceilings that take no time."""

    def run(module, arguments):
        if hasattr(module, "Ceilings"):
            monkeypatch.setattr(module, "Ceilings", functools.partial(Ceilings, matmul_size=64, swept_shape=(16, 64)))
        module.run(dataclasses.replace(arguments, json="-"))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1, "something else was printed"
        result = json.loads(lines[0])
        assert result["benchmark"] == module.__name__.rpartition(".")[2]
        assert set(COMMON) | VERSIONS <= result.keys()
        for row in result.get("rows", [result]):
            check_figures(row)
        return result

    return run


def check_figures(row):
    """What must hold for any row: rates are positive and their fraction is what it says it is."""
    assert 0 < row["seconds_lowest"] <= row["seconds"] <= row["seconds_highest"]
    if row.get("fraction_of_ceiling") is not None and row.get("ceiling_flops_per_second") is not None:
        kind = row["bound"]
        assert row["fraction_of_ceiling"] == pytest.approx(row[f"{kind}_per_second"] / row[f"ceiling_{kind}_per_second"])
        assert row["fraction_of_ceiling"] > 0
