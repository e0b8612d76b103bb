"""The benchmark of one MoE layer: what it runs is the layer, and what it counts is the work that was done."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from moejax.bench import moe
from moejax.config import MeshConfig, UserError
from tests.bench.conftest import SMALL

EXPERT = 6 * 32 * 48  # FLOP of one choice
ROUTER = 2 * 32 * 8  # FLOP of one row


def compiled(dispatch, backward=False):
    return moe.compile_layer(dataclasses.replace(SMALL, dispatch=dispatch), None, 64, backward)


def test_the_kinds_compute_the_same_and_capacity_is_counted_without_what_it_drops():
    layers = {kind: compiled(kind) for kind in moe.ON_ONE_DEVICE}
    assert set(layers) == {"sorted", "capacity", "dense"}
    np.testing.assert_allclose(layers["sorted"].run(), layers["dense"].run(), rtol=1e-4, atol=1e-6)
    assert layers["sorted"].flops == layers["dense"].flops == 128 * EXPERT + 64 * ROUTER
    dropped = layers["capacity"].facts["dropped_choices"]
    assert dropped > 0 and layers["capacity"].flops == (128 - dropped) * EXPERT + 64 * ROUTER
    assert layers["sorted"].bytes == 4 * (8 * 3 * 32 * 48 + 8 * 32 + 2 * 64 * 32)  # 64 tokens meet all experts


def test_backward_gives_the_result_and_every_gradient():
    layer = compiled("dense", backward=True)
    out, (weights, rows) = layer.run()
    assert np.any(out != 0) and out.shape == rows.shape
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves((weights, rows)))
    assert layer.flops == 3 * (128 * EXPERT + 64 * ROUTER)
    balanced = moe.compile_balanced(SMALL, 64, backward=True)
    assert balanced.flops == 3 * 128 * EXPERT and balanced.run()[0].shape == (8, 16, 32)


@pytest.mark.slow
def test_a_row_for_each_kind_pass_and_number_of_tokens(run_benchmark):
    result = run_benchmark(moe, moe.Arguments(model=SMALL, tokens=(64,), dispatch=("dense",), repeats=2))
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "dense, forward, 64 tokens" and len(set(names)) == len(names) == 4
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(64)
    for row in result["rows"]:
        assert row["flops_per_second"] * row["seconds"] == pytest.approx(row["flops"])
        assert (row["fraction_of_balanced"] == 1) == (row["dispatch"] == moe.BALANCED)


@pytest.mark.slow
def test_on_a_mesh(run_benchmark):
    arguments = moe.Arguments(model=SMALL, mesh=MeshConfig(expert=4), tokens=(64,), dispatch=("gather",), repeats=1)
    rows = run_benchmark(moe, arguments)["rows"]
    assert [row["name"] for row in rows[:2]] == ["gather, forward, 64 tokens", "gather, forward and backward, 64 tokens"]
    with pytest.raises(UserError, match="tokens has 9, which 8 devices do not divide"):
        moe.run(dataclasses.replace(arguments, tokens=(9,)))


@pytest.mark.parametrize(("mesh", "kind", "message"), [(1, "gather", "sorted, capacity, dense"), (4, "sorted", "gather, ragged, capacity")])
def test_a_kind_that_does_not_run_there(mesh, kind, message):
    with pytest.raises(UserError, match=f"dispatch has '{kind}'; expected some of {message}"):
        moe.Arguments(mesh=MeshConfig(expert=mesh), dispatch=(kind,))
    with pytest.raises(UserError, match="tokens="):
        moe.Arguments(tokens=(0,))
