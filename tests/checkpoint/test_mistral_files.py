"""Mistral's own layout: the same weights as in Hugging Face's give the same tree, bit by bit, from every kind of file."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

import moejax
from moejax.checkpoint import mistral_files, torch_files
from moejax.checkpoint.names import export_tensors
from moejax.config import UserError
from moejax.families.mixtral import ORIGINAL

torch_only = pytest.mark.torch
WEIGHTS = [
    pytest.param("mixtral_original", ".", marks=torch_only),
    pytest.param("mixtral_original_release8", "release8", marks=torch_only),
    ("mixtral_original_safetensors", "."),
]


@pytest.mark.parametrize(("case", "folder"), WEIGHTS)
def test_same_weights_as_hugging_faces(golden, assert_equal_trees, case, folder):
    directory = golden(case).directory
    if folder != "." or case == "mixtral_original":
        pytest.importorskip("torch", reason="the torch extra is not installed")
    config = mistral_files.read_model_config(directory / folder)
    expected = torch_files.read_model_config(directory / "hf")
    assert dataclasses.replace(config, head_size=None) == dataclasses.replace(expected, head_size=None)
    assert config.head_width == expected.head_width
    tree = mistral_files.read_parameters(directory / folder, config)
    assert_equal_trees(tree, torch_files.read_parameters(directory / "hf", expected))
    _, variables, _ = moejax.load(directory / folder)
    assert_equal_trees(tree, variables["params"])


@pytest.mark.parametrize("case", ["mixtral_original", "mixtral_original_safetensors"])
def test_what_is_written_is_what_was_read(golden, tmp_path, case, assert_equal_trees):
    """Every weight of the Hugging Face copy under Mistral's names, and back; no torch is needed for it."""
    source = golden(case).directory
    config = torch_files.read_model_config(source / "hf")
    tree = torch_files.read_parameters(source / "hf", config)
    tensors = dict(export_tensors(tree, config, ORIGINAL))
    if case == "mixtral_original_safetensors":
        published = load_file(source / "consolidated.safetensors")
        assert {key: value.tobytes() for key, value in tensors.items()} == {key: value.tobytes() for key, value in published.items()}
    save_file(tensors, tmp_path / "consolidated.safetensors")
    shutil.copyfile(source / "params.json", tmp_path / "params.json")
    assert_equal_trees(tree, mistral_files.read_parameters(tmp_path, mistral_files.read_model_config(tmp_path)))


def test_errors_name_what_is_wrong(golden, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(golden("mixtral_original_safetensors").directory, directory)
    tensors = load_file(directory / "consolidated.safetensors")
    del tensors["layers.1.feed_forward.experts.2.w2.weight"]
    save_file(tensors, directory / "consolidated.safetensors")
    with pytest.raises(UserError, match=r"1 \(layers.1.feed_forward.experts.2.w2.weight\) missing"):
        moejax.load(directory)
    (directory / "params.json").unlink()
    with pytest.raises(UserError, match=r"has no params.json beside its weights"):
        moejax.load(directory)
    (directory / "consolidated.safetensors").unlink()
    (directory / "params.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"neither consolidated.safetensors nor consolidated.00.pth"):
        mistral_files.open_tensors(directory)
    for names, message in (
        (["consolidated.00.pth", "consolidated.01.pth"], "several files split every tensor"),
        (["consolidated.00.pt", "consolidated.02.pt"], "lacks consolidated.01.pt"),
    ):
        folder = tmp_path / names[1]
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
        with pytest.raises(UserError, match=message):
            mistral_files.open_tensors(folder)
