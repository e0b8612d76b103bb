"""The parameter tree: every layer has one place in it."""

from __future__ import annotations

import jax
import pytest

from moejax.config import ModelConfig
from moejax.families.layout import abstract_parameters, flatten_leaves, locate_layer


@pytest.mark.parametrize(("layers", "period"), [(1, 1), (3, 1), (4, 2), (5, 2), (7, 3), (2, 3)])
def test_every_layer_has_its_own_place(layers, period):
    config = ModelConfig(num_layers=layers, moe_every=period)
    places = [locate_layer(config, layer) for layer in range(layers)]
    assert len(set(places)) == layers
    tree = abstract_parameters(config)
    for layer, (block, index) in enumerate(places):
        leaves = tree[block[0]] if len(block) == 1 else tree[block[0]][block[1]]
        assert ("moe" in leaves) == config.is_moe_layer(layer)
        assert leaves["attention_norm"]["scale"].shape[:-1] == ((layers // period,) if index else ())


def test_the_tree_of_an_interleaved_model_with_a_tail():
    config = ModelConfig(
        num_layers=5, moe_every=2, num_experts=4, hidden_size=32, intermediate_size=48, num_heads=4, param_dtype="bfloat16"
    )
    leaves = flatten_leaves(abstract_parameters(config))
    assert leaves[("layers", "block_1", "moe", "gate", "kernel")].shape == (2, 4, 48, 32)
    assert leaves[("layers", "block_1", "residual", "down", "kernel")].shape == (2, 32, 32)
    assert leaves[("layers", "block_0", "mlp", "down", "kernel")].shape == (2, 32, 48)
    assert leaves[("layer_4", "mlp", "up", "kernel")].shape == (48, 32)
    assert all(leaf.dtype == jax.numpy.bfloat16 for leaf in leaves.values())
