"""The name tables run both ways: every number has one place on each side."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from moejax.checkpoint.names import export_tensors, import_tensors, list_pieces, list_sources
from moejax.families import get_family
from moejax.families.arctic import ARCTIC_480B
from moejax.families.layout import abstract_parameters, flatten_leaves
from moejax.families.mixtral import CLASSIC, FIRST_RELEASE, FUSED, ORIGINAL


def test_pieces_cover_every_leaf_and_every_tensor_once(config):
    for table in get_family(config.family).tables:
        leaves = {path: np.zeros(leaf.shape, int) for path, leaf in flatten_leaves(abstract_parameters(config)).items()}
        tensors = {key: np.zeros(shape, int) for key, shape in list_sources(config, table).items()}
        for piece in list_pieces(config, table):
            assert leaves[piece.path][piece.index].shape == piece.shape
            assert tensors[piece.key][piece.source_index].shape == piece.part_shape
            assert tensors[piece.key].shape == piece.source_shape
            leaves[piece.path][(*piece.index, ...)] += 1
            tensors[piece.key][(*piece.source_index, ...)] += 1
        assert all((counts == 1).all() for counts in leaves.values())
        assert all((counts == 1).all() for counts in tensors.values())


def test_export_then_import_is_bit_equal(config, random_tree, assert_equal_trees):
    for dtype in ("float32", "bfloat16"):
        tree = random_tree(config, dtype)
        for table in get_family(config.family).tables:
            tensors = dict(export_tensors(tree, config, table))
            assert {key: value.shape for key, value in tensors.items()} == list_sources(config, table)

            def read_into(key, source_index, out, tensors=tensors):
                assert out.flags.c_contiguous
                out[...] = tensors[key][source_index]

            back = import_tensors(config, table, read_into, lambda path, keys, tensors=tensors: tensors[keys[0]].dtype)
            assert_equal_trees(tree, back)


def test_export_leaves_the_tree_alone(small_config, random_tree):
    tree = random_tree(small_config)
    for _, tensor in export_tensors(tree, small_config, get_family("arctic").tables[0]):
        tensor[...] = 7
    assert not any((leaf == 7).any() for leaf in jax.tree.leaves(tree))


def test_published_names_and_shapes_of_arctic():
    sources = list_sources(dataclasses.replace(ARCTIC_480B, num_layers=2), get_family("arctic").tables[0])
    assert sources["model.layers.1.self_attn.k_proj.weight"] == (1024, 7168)
    assert sources["model.layers.1.residual_mlp.w2.weight"] == (7168, 7168)
    assert sources["model.layers.0.block_sparse_moe.experts.127.w2.weight"] == (7168, 4864)
    assert sources["model.layers.0.block_sparse_moe.gate.weight"] == (128, 7168)
    assert len(sources) == 3 + 2 * (4 + 3 + 3 + 1 + 3 * 128)


def test_fused_tensors_hold_gate_rows_then_up_rows(small_mixtral, random_tree):
    config = small_mixtral
    tree = random_tree(config)
    classic, fused = dict(export_tensors(tree, config, CLASSIC)), dict(export_tensors(tree, config, FUSED))
    expert = "model.layers.1.block_sparse_moe.experts.2."
    gate_up = np.concatenate([classic[expert + "w1.weight"], classic[expert + "w3.weight"]])
    np.testing.assert_array_equal(fused["model.layers.1.mlp.experts.gate_up_proj"][2], gate_up)
    np.testing.assert_array_equal(fused["model.layers.1.mlp.experts.down_proj"][2], classic[expert + "w2.weight"])


def test_mistrals_queries_and_keys_pair_neighbouring_rows(small_mixtral, random_tree):
    """Row head * width + s * width / 2 + i of Hugging Face is row head * width + 2 i + s of Mistral; nothing else moves."""
    config = small_mixtral
    tree = random_tree(config)
    classic, original = dict(export_tensors(tree, config, CLASSIC)), dict(export_tensors(tree, config, ORIGINAL))
    width = config.head_width
    for theirs, ours, heads in (("wq", "q_proj", config.num_heads), ("wk", "k_proj", config.num_kv_heads)):
        for head in range(heads):
            for s in range(2):
                for i in range(width // 2):
                    row = classic[f"model.layers.1.self_attn.{ours}.weight"][head * width + s * width // 2 + i]
                    moved = original[f"layers.1.attention.{theirs}.weight"][head * width + 2 * i + s]
                    np.testing.assert_array_equal(row, moved)
    for theirs, ours in (
        ("attention.wv", "self_attn.v_proj"),
        ("attention.wo", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
    ):
        np.testing.assert_array_equal(original[f"layers.0.{theirs}.weight"], classic[f"model.layers.0.{ours}.weight"])


def test_the_first_release_has_experts_below_each_other_and_w2_transposed(small_mixtral, random_tree):
    config = small_mixtral
    tree = random_tree(config)
    classic, first = dict(export_tensors(tree, config, CLASSIC)), dict(export_tensors(tree, config, FIRST_RELEASE))
    width = config.intermediate_size
    for expert in range(config.num_experts):
        rows = slice(expert * width, (expert + 1) * width)
        for name in ("w1", "w2", "w3"):
            part = first[f"layers.1.block_sparse_moe.{name}"][rows]
            published = classic[f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"]
            np.testing.assert_array_equal(part.T if name == "w2" else part, published)


def test_names_of_arctic_through_deepspeed(small_config):
    classic, deepspeed = (list_sources(small_config, table) for table in get_family("arctic").tables)
    layer = "model.layers.1.block_sparse_moe."
    assert deepspeed[layer + "mlp.deepspeed_moe.gate.wg.weight"] == classic[layer + "gate.weight"]
    experts = layer + "mlp.deepspeed_moe.experts.deepspeed_experts."
    assert deepspeed[experts + "2.w2.weight"] == classic[layer + "experts.2.w2.weight"]
    assert len(deepspeed) == len(classic)
