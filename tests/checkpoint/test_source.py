"""One way to read every layout, and one answer to which of several is read."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from moejax.checkpoint import mistral_files, torch_files
from moejax.checkpoint.source import LAYOUTS, open_source, read_tree
from moejax.checkpoint.torch_files import read_model_config, read_parameters
from moejax.config import UserError
from moejax.families.layout import abstract_parameters, flatten_leaves

CASES = [
    ("mixtral_hf", "", torch_files),
    ("mixtral_hf_sharded", "", torch_files),
    ("arctic_parallel_mixed", "", torch_files),
    ("arctic_interleaved", "", torch_files),
    ("mixtral_original_safetensors", "", mistral_files),
    pytest.param("mixtral_original", "", mistral_files, marks=pytest.mark.torch),
    pytest.param("mixtral_original_release8", "release8", mistral_files, marks=pytest.mark.torch),
]


@pytest.mark.parametrize(("case", "folder", "reader"), CASES)
def test_the_tree_is_that_of_the_reader(case, folder, reader, golden, assert_equal_trees):
    directory = golden(case).directory / folder
    if any(directory.glob("*.pt*")):
        pytest.importorskip("torch", reason="the torch extra is not installed")
    with open_source(directory) as source:
        assert source.config == reader.read_model_config(directory)
        assert_equal_trees(read_tree(source), reader.read_parameters(directory, source.config))
        assert {path for path in source.dtypes} == set(flatten_leaves(abstract_parameters(source.config)))


def test_pieces_come_in_the_order_of_the_files(golden):
    """Files are then read from front to back, once."""
    with open_source(golden("mixtral_hf_sharded").directory) as source:
        names = [source.file_of(piece).name for piece in source.pieces]
        assert names == sorted(names)
        assert {file.name for file in source.files} == {*names, "config.json", "model.safetensors.index.json"}


def test_the_dtype_asked_for(golden):
    directory = golden("mixtral_hf").directory
    with open_source(directory, "bfloat16") as source:
        tree = read_tree(source)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"bfloat16"}
        assert source.config.param_dtype == source.config.dtype == "bfloat16"
    exact = read_parameters(directory, read_model_config(directory))
    expected = exact["head"]["kernel"].astype(tree["head"]["kernel"].dtype)
    assert np.array_equal(tree["head"]["kernel"], expected)


def test_of_several_layouts_the_first_is_read_and_named(tmp_path, golden):
    shutil.copytree(golden("mixtral_hf_sharded").directory, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"never read")
    with open_source(tmp_path / "a") as source:
        assert "chosen before Hugging Face, model.safetensors" in source.layout
    shutil.copyfile(
        golden("mixtral_original_safetensors").directory / "consolidated.safetensors", tmp_path / "a" / "consolidated.safetensors"
    )
    with open_source(tmp_path / "a") as source:
        assert "Mistral, consolidated, which lie there too" in source.layout
    (tmp_path / "a" / "moejax.json").write_text("{}")
    with pytest.raises(UserError, match="is a checkpoint of moejax already"), open_source(tmp_path / "a"):
        pass
    assert [layout.name.split(", ")[0] for layout in LAYOUTS][:2] == ["Hugging Face"] * 2


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"), open_source(tmp_path / "none"):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"), open_source(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match=r"has no config\.json"), open_source(tmp_path):
        pass


def test_defaults_of_generation_and_extra_files_are_carried(tmp_path, golden):
    directory = tmp_path / "a"
    shutil.copytree(golden("mixtral_hf").directory, directory)
    for name in ("tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (directory / name).write_text("x")
    for ids, expected in ((7, (7,)), ([2, 5], (2, 5)), (None, (2,)), ([], (2,))):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        with open_source(directory) as source:
            assert source.config.eos_token_ids == expected
    assert [path.name for path in source.extra_files] == [
        "chat_template.jinja", "generation_config.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json",
    ]  # fmt: skip
    for text in ("[]", "{", '{"eos_token_id": "</s>"}', '{"eos_token_id": 123456}'):
        (directory / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json is damaged"), open_source(directory):
            pass
