"""The benchmark of growth: rows for each size, axes measured one at a time and put together, and axes that are none."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moejax.bench import growth
from moejax.config import UserError
from moejax.families.flops import count_flops
from tests.bench.conftest import SMALL

TINY = growth.Arguments(
    experts=(4, 8),
    sequence=(8, 16),
    batch=(1, 2),
    layers=(1, 2),
    layer=dataclasses.replace(SMALL, dispatch="dense"),
    rows=32,
    model=SMALL,
    row_length=8,
    repeats=1,
)


def test_experts_at_fixed_active_parameters(run_benchmark):
    rows = run_benchmark(growth, dataclasses.replace(TINY, axes=("experts",)))["rows"]
    assert [row["name"] for row in rows] == [f"experts {count}, {kind}" for kind in ("forward", "forward and backward") for count in (4, 8)]
    for row, first in zip(rows, [rows[0], rows[0], rows[2], rows[2]], strict=True):
        times = 1 if row["pass"] == "forward" else 3
        assert row["flops"] == times * (6 * 64 * 32 * 48 + 2 * 32 * 32 * row["value"])  # only the router grows
        assert row["seconds_over_first"] == pytest.approx(row["seconds"] / first["seconds"])


@pytest.mark.slow
def test_axes_measured_apart_are_put_together_and_drawn(tmp_path, run_benchmark):
    earlier = tmp_path / "earlier.json"
    kept = {"name": "layers 7", "axis": "layers", "value": 7, "tokens": 8, "compile_seconds": 2.0}
    kept |= {"seconds": 1.0, "seconds_lowest": 1.0, "seconds_highest": 1.0}
    replaced = {"name": "experts 4, forward", "axis": "experts", "value": 4, "pass": "forward", "seconds": 1e9}
    earlier.write_text(json.dumps({"benchmark": "growth", "rows": [kept, replaced]}))
    arguments = dataclasses.replace(TINY, axes=("experts",), experts=(4,), join=(str(earlier),), figure=str(tmp_path / "figure.svg"))
    rows = run_benchmark(growth, arguments)["rows"]
    assert [row["name"] for row in rows] == ["experts 4, forward", "experts 4, forward and backward", "layers 7"]
    assert rows[0]["seconds"] < 1e9
    drawn = (tmp_path / "figure.svg").read_text()
    assert "one MoE layer" in drawn or "<path" in drawn
    with pytest.raises(UserError, match=r"--join .*, but it cannot be read"):
        growth.run(dataclasses.replace(TINY, axes=(), join=(str(tmp_path / "missing.json"),)))


@pytest.mark.slow
def test_steps_of_every_other_axis(run_benchmark):
    arguments = dataclasses.replace(TINY, axes=("sequence", "batch", "layers"), sequence=(16,), batch=(2,), layers=(2,))
    rows = run_benchmark(growth, arguments)["rows"]
    assert [row["name"] for row in rows] == ["sequence 16", "batch 2", "layers 2"]
    shapes = [(1, 16, 1), (2, 8, 1), (1, 8, 2)]
    for row, (batch, length, layers) in zip(rows, shapes, strict=True):
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(batch * length)
        assert row["flops"] == count_flops(dataclasses.replace(SMALL, num_layers=layers), batch, length)
        assert row["compile_seconds"] > 0 and row["compile_over_first"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": ("depth",)}, "axes has 'depth'; expected some of experts, sequence, batch, layers"),
        ({"axes": ("batch",), "batch": ()}, "batch=.*expected one size or more"),
        ({"axes": ()}, "axes is empty, and so is join"),
        ({"figure": "growth.pdf"}, "expected a file that ends in .svg or .png"),
    ],
)
def test_arguments_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        growth.Arguments(**changes)
