"""Reading safetensors files: the same numbers as the safetensors library, straight into place; damage is named."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.checkpoint.safetensors_file import read_header, read_tensor_into
from moejax.config import UserError


@pytest.fixture
def file(tmp_path):
    """A file of one tensor of each dtype that is read."""
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.standard_normal((3, 4, 5)).astype(dtype)
        for name, dtype in (("f32", np.float32), ("f16", np.float16), ("bf16", ml_dtypes.bfloat16))
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors", tensors


def read(path, tensor, index, out):
    handle = os.open(path, os.O_RDONLY)
    read_tensor_into(handle, tensor, index, out)
    os.close(handle)
    return out


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("index", [(), (1,), (2, 3), (slice(1, 3),), (1, slice(2, 4))])
def test_parts_are_read_into_place_bit_by_bit(file, name, index):
    path, tensors = file
    expected = tensors[name][index]
    tensor = read_header(path)[name]
    assert tensor.shape == (3, 4, 5)
    whole = np.zeros((2, *expected.shape), expected.dtype)
    read(path, tensor, index, whole[1])
    assert whole[1].tobytes() == expected.tobytes()
    assert not whole[0].any()


@pytest.mark.parametrize(("name", "dtype"), [("f32", ml_dtypes.bfloat16), ("bf16", np.float32), ("bf16", np.float16), ("f16", np.float32)])
def test_another_dtype_is_converted_to(file, name, dtype):
    path, tensors = file
    out = read(path, read_header(path)[name], (1,), np.empty((2, 4, 5), dtype)[1])
    assert out.tobytes() == tensors[name][1].astype(dtype).tobytes()


def test_conversion_goes_by_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("moejax.checkpoint.safetensors_file.CONVERTED_AT_ONCE", 7)
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6)
    save_file({"a": numbers}, tmp_path / "a.safetensors")
    out = read(tmp_path / "a.safetensors", read_header(tmp_path / "a.safetensors")["a"], (slice(1, 4),), np.empty((3, 6), np.float16))
    np.testing.assert_array_equal(out, numbers[1:].astype(np.float16))


def test_scalars_and_empty_tensors(tmp_path):
    save_file({"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float32)}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors", header["scalar"], (), np.empty((), np.float32)) == 3
    assert header["empty"].shape == (0, 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-10], "its header promises .*; it is truncated"),
        (lambda raw: raw + b"123", "it is damaged"),
        (lambda raw: raw[:40], "no whole safetensors file"),
        (lambda raw: raw[:3], "no whole safetensors file"),
        (lambda raw: b"", "no whole safetensors file"),
        (lambda raw: b"<!DOCTYPE html><html>", "no whole safetensors file"),
        (lambda raw: raw[:8] + b"x" + raw[9:], "damaged safetensors header"),
        (lambda raw: raw.replace(b'"F32"', b'"F64"', 1), "damaged safetensors header"),
        (lambda raw: raw.replace(b"[3,4,5]", b"[3,4,4]", 1), "damaged safetensors header"),
    ],
)
def test_damaged_files_are_named(file, damage, message):
    path, _ = file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)
