"""Files of PyTorch: only tensors come out of them, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

import moejax
from moejax.checkpoint.mistral_files import open_tensors
from moejax.config import UserError

PARAMS = '{"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "vocab_size": 8, "moe": {"num_experts": 2, "num_experts_per_tok": 2}}'


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the torch extra is not installed")


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.00.pt"])
@pytest.mark.parametrize("wrapped", ["torch", "plain"])
def test_a_malicious_pickle_runs_nothing(torch, tmp_path, name, wrapped):
    proof = tmp_path / "ran"
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "params.json").write_text(PARAMS)
    payload = {"tok_embeddings.weight": Malicious(proof)}
    if wrapped == "torch":
        torch.save(payload, directory / name)
    else:
        (directory / name).write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match=rf"{name} is not read: it holds more than tensors.*nothing in it was run") as refusal:
        moejax.load(directory)
    assert "weights_only" not in str(refusal.value)  # torch's message goes on to say how to load it after all
    assert not proof.exists()
    if wrapped == "torch":  # the proof would appear if it ran
        with zipfile.ZipFile(directory / name) as archive:
            pickled = archive.read(next(entry for entry in archive.namelist() if entry.endswith("data.pkl")))
        assert b"system" in pickled and str(proof).encode() in pickled


@pytest.mark.torch
def test_every_dtype_and_stride_arrives(torch, tmp_path):
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7
    tensors = {
        "single": values,
        "half": values.half(),
        "brain": values.bfloat16(),
        "double": values.double(),
        "transposed": values.T,
        "parameter": torch.nn.Parameter(values),
    }
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    with open_tensors(tmp_path) as files:
        assert files.dtype("brain") == np.dtype(ml_dtypes.bfloat16)
        for key in ("single", "half", "brain", "double", "parameter"):
            np.testing.assert_array_equal(files.read(key).astype(np.float64), tensors[key].detach().double().numpy())
        assert files.tensors["transposed"].shape == (4, 3)
        np.testing.assert_array_equal(files.read("transposed"), values.numpy().T)
        row = np.empty((1, 4), np.float32)
        files.read_into("brain", (slice(1, 2),), row)
        np.testing.assert_array_equal(row, tensors["brain"][1:2].float().numpy())


@pytest.mark.torch
def test_what_is_no_tensor_by_name_is_refused(torch, tmp_path):
    for values, message in (
        ([torch.ones(2)], "holds a list, expected tensors by name"),
        ({"step": 3}, "step is no plain tensor"),
        ({"norm.weight": torch.ones(3).to_sparse()}, "norm.weight is no plain tensor"),
    ):
        torch.save(values, tmp_path / "consolidated.00.pth")
        with pytest.raises(UserError, match=message):
            open_tensors(tmp_path)
    torch.save({"norm.weight": torch.ones(3, dtype=torch.int64)}, tmp_path / "consolidated.00.pth")
    with open_tensors(tmp_path) as files, pytest.raises(UserError, match=r"norm.weight is of dtype int64"):
        files.dtype("norm.weight")


@pytest.mark.torch
def test_a_truncated_file_is_named(torch, tmp_path):
    path = tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"consolidated.00.pth is not read: .* is damaged"):
        open_tensors(tmp_path)


@pytest.mark.torch
def test_one_tensor_in_two_files_is_refused(torch, tmp_path):
    for part in range(2):
        torch.save({"norm.weight": torch.ones(4)}, tmp_path / f"consolidated.{part:02}.pt")
    with pytest.raises(UserError, match=r"consolidated.01.pt holds norm.weight, which consolidated.00.pt holds too"):
        open_tensors(tmp_path)


def test_without_torch_the_extra_is_named(golden, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch is not installed; install it: pip install 'moejax\[torch\]'"):
        moejax.load(golden("mixtral_original").directory)
