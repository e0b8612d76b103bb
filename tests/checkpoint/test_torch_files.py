"""Published checkpoints: exact numbers in, and every checkpoint that cannot be read exactly refused by name."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moejax.checkpoint.names import export_tensors, list_pieces
from moejax.checkpoint.torch_files import read_hf_config, read_model_config, read_parameters
from moejax.config import UserError
from moejax.families import get_family
from moejax.families.layout import abstract_parameters, flatten_leaves
from moejax.families.mixtral import FUSED

CASES = [
    "mixtral_hf", "mixtral_hf_sharded", "mixtral_hf_sliding_window",
    "arctic_parallel", "arctic_interleaved", "arctic_top1", "arctic_parallel_mixed", "arctic_sliding_window",
]  # fmt: skip


def load_all(directory) -> dict[str, np.ndarray]:
    """Every tensor of a directory, by the safetensors library: the oracle."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture
def checkpoint(tmp_path, golden):
    """A function: a writable copy of a reference checkpoint."""

    def copy(case: str = "mixtral_hf"):
        directory = tmp_path / case
        shutil.copytree(golden(case).directory, directory)
        return directory

    return copy


def edit_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_arrives_in_its_place(case, golden):
    directory = golden(case).directory
    config = read_model_config(directory)
    leaves = flatten_leaves(read_parameters(directory, config))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: leaf.shape for path, leaf in flatten_leaves(abstract_parameters(config)).items()
    }
    tensors, used = load_all(directory), Counter()
    for piece in list_pieces(config, get_family(config.family).tables[0]):
        np.testing.assert_array_equal(leaves[piece.path][piece.index], tensors[piece.key])
        used[piece.key] += 1
    assert used == Counter(tensors.keys())


@pytest.mark.parametrize("case", CASES)
def test_an_exported_checkpoint_has_the_tensors_it_was_read_from(case, golden):
    directory = golden(case).directory
    config = read_model_config(directory)
    tensors = load_all(directory)
    exported = dict(export_tensors(read_parameters(directory, config), config, get_family(config.family).tables[0]))
    assert exported.keys() == tensors.keys()
    assert all(exported[key].tobytes() == tensors[key].tobytes() for key in tensors)


def test_fused_names_give_the_same_tree(golden, tmp_path, assert_equal_trees):
    """The file of the case mixtral_hf_fused_names is rebuilt: it has the weights of mixtral_hf under other names."""
    classic, fused = golden("mixtral_hf").directory, tmp_path / "fused"
    shutil.copytree(golden("mixtral_hf_fused_names").directory, fused)
    tensors = load_file(classic / "model.safetensors")
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        tensors[new + "gate.weight"] = tensors.pop(old + "gate.weight")
        experts = [[tensors.pop(f"{old}experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")] for e in range(8)]
        tensors[new + "experts.gate_up_proj"] = np.stack([np.concatenate([w1, w3]) for w1, w3, _ in experts])
        tensors[new + "experts.down_proj"] = np.stack([w2 for *_, w2 in experts])
    save_file(tensors, fused / "model.safetensors")
    config = read_model_config(fused)
    tree = read_parameters(fused, config)
    assert_equal_trees(tree, read_parameters(classic, config))
    assert all(array.tobytes() == tensors[key].tobytes() for key, array in export_tensors(tree, config, FUSED))


def test_bfloat16_is_kept_or_converted(checkpoint):
    directory = checkpoint()
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")
    config = read_model_config(directory)  # config.json says float32: the weights decide
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    kept = read_parameters(directory, config)
    assert kept["head"]["kernel"].tobytes() == tensors["lm_head.weight"].tobytes()
    converted = read_parameters(directory, config, dtype="float32")
    np.testing.assert_array_equal(converted["head"]["kernel"], tensors["lm_head.weight"].astype(np.float32))
    assert read_model_config(directory, dtype="float32").param_dtype == "float32"


def test_mixed_dtypes_are_kept_leaf_by_leaf(checkpoint):
    directory = checkpoint()
    tensors = load_file(directory / "model.safetensors")
    for key in tensors:
        if "norm" not in key and "experts.0" not in key:
            tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    config = read_model_config(directory)
    tree = read_parameters(directory, config)
    assert config.param_dtype == "bfloat16"
    assert tree["final_norm"]["scale"].dtype == np.float32
    assert tree["head"]["kernel"].dtype == ml_dtypes.bfloat16
    # One expert in float32, seven in bfloat16: nothing is rounded.
    assert tree["layers"]["block_0"]["moe"]["gate"]["kernel"].dtype == np.float32


@pytest.mark.parametrize("claimed", [6, 1])
def test_kv_heads_of_arctic_are_those_of_the_tensors(checkpoint, claimed):
    directory = checkpoint("arctic_parallel")
    edit_config(directory, num_key_value_heads=claimed)
    config = read_model_config(directory)
    assert config.num_kv_heads == 2
    read_parameters(directory, config)


def test_rotary_tables_of_old_files_are_ignored(checkpoint):
    directory = checkpoint()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float64)
    save_file(tensors, directory / "model.safetensors")
    read_parameters(directory, read_model_config(directory))


def test_a_tied_head_may_be_absent_or_equal_but_not_different(checkpoint):
    directory = checkpoint()
    edit_config(directory, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        read_parameters(directory, read_model_config(directory))
    for head in (tensors["model.embed_tokens.weight"], None):
        tensors.pop("lm_head.weight", None)
        save_file(tensors if head is None else tensors | {"lm_head.weight": head}, directory / "model.safetensors")
        assert "head" not in read_parameters(directory, read_model_config(directory))


# -- refusals by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised by AWQ; moejax reads unquantised"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by GPTQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised by bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by FP8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantised by compressed-tensors"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised by hqq"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"model_type is 'llama' \(LlamaForCausalLM\); moejax reads mixtral \(MixtralForCausalLM\) and arctic",
        ),
        ({"model_type": None, "architectures": None}, "model_type is None"),
    ],
)
def test_other_formats_and_architectures_are_refused_by_name(checkpoint, values, message):
    directory = checkpoint()
    edit_config(directory, **values)
    with pytest.raises(UserError, match=message) as error:
        read_hf_config(directory)
    assert str(directory / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mixtral.Q4_K_M.gguf"], "holds mixtral.Q4_K_M.gguf: it is a GGUF checkpoint"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "PyTorch pickles"),
        (["config.json", "pytorch_model.bin"], "PyTorch pickles"),
        (["config.json", "model.safetensors", "quant_config.json"], "AWQ checkpoint"),
        (["config.json", "model.safetensors", "quantize_config.json"], "GPTQ checkpoint"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter"),
        (["model.safetensors"], "has no config.json"),
    ],
)
def test_directories_of_another_kind_are_refused_by_name(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        read_hf_config(tmp_path)


def test_fp8_tensors_are_refused_though_the_config_is_silent(checkpoint):
    directory = checkpoint()
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is of dtype F8_E4M3 \(FP8\)"):
        read_model_config(directory)


def test_missing_unexpected_and_wrong_shaped_tensors_are_listed(checkpoint):
    directory = checkpoint()
    config = read_model_config(directory)
    tensors = load_file(directory / "model.safetensors")
    for expert in range(5):
        del tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["model.norm.weight"] = np.zeros(63, np.float32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError) as error:
        read_parameters(directory, config)
    message = str(error.value)
    assert "5 (model.layers.1.block_sparse_moe.experts.0.w2.weight, " in message and ", ...) missing" in message
    assert "1 (model.layers.0.self_attn.q_proj.bias) unexpected" in message
    assert "1 (model.norm.weight [63] instead of [64]) of the wrong shape" in message


def edit_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shards_are_named(checkpoint):
    directory = checkpoint("mixtral_hf_sharded")
    (directory / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 \(model-00002-of-00005.safetensors\) of the 5 files"):
        read_model_config(directory)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "/etc/x.safetensors", "sub/model.safetensors", "..\\secret.safetensors", ".."]
)
def test_an_index_that_points_outside_is_refused(checkpoint, place):
    directory = checkpoint("mixtral_hf_sharded")
    edit_index(directory, lambda places: places.update({"lm_head.weight": place}))
    with pytest.raises(UserError, match="cannot be trusted"):
        read_model_config(directory)


def test_an_index_that_disagrees_with_its_files_is_refused(checkpoint):
    directory = checkpoint("mixtral_hf_sharded")
    edit_index(directory, lambda places: places.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"hold 1 \(lm_head.weight\), unknown to"):
        read_model_config(directory)
    edit_index(directory, lambda places: places.update({"lm_head.weight": "model-00002-of-00005.safetensors"}))
    with pytest.raises(UserError, match=r"places 1 \(lm_head.weight\) in files that do not hold them"):
        read_model_config(directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_damaged_json_is_named(checkpoint, text):
    directory = checkpoint("mixtral_hf_sharded")
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json .*damaged"):
        read_model_config(directory)
    if "weight_map" not in text:
        (directory / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json .*damaged"):
            read_model_config(directory)


def test_truncated_files_are_named(checkpoint):
    directory = checkpoint("mixtral_hf_sharded")
    path = directory / "model-00003-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model-00003-of-00005.safetensors holds .* truncated"):
        read_model_config(directory)


def test_shards_without_an_index_are_no_checkpoint(checkpoint):
    directory = checkpoint("mixtral_hf_sharded")
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"has neither model.safetensors.index.json nor model.safetensors \(it has model-00001"):
        read_model_config(directory)
