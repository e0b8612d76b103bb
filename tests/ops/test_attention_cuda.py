"""Attention on NVIDIA GPUs: which keys it names, what it refuses, and what it lowers to. No GPU is here to run it."""

import importlib.util
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import export
from jax import numpy as jnp

from moejax.checks import UserError
from moejax.ops import attention_cuda, platforms
from moejax.ops.attention_cuda import attend_cuda, key_ranges, needs_ranges, why_not
from moejax.ops.visibility import Indices, Visibility, visible_keys

needs_tokamax = pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed (CONTRIBUTING.md)")
KERNELS = ("mosaic_gpu_v2", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]], np.int32)
REAL = np.array([[True] * 8 + [False] * 4, [True] * 12])


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("real", [None, REAL])
def test_ranges_are_the_keys_a_query_sees(window, segments, real):
    index = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    real, segments = (None if part is None else jnp.asarray(part) for part in (real, segments))
    visible = np.asarray(visible_keys(Visibility(Indices(index, segments), Indices(index, segments, real), window=window)))
    first, end, is_right = (np.asarray(part) for part in key_ranges((2, 12), window, real, segments))
    assert is_right.all()
    places = np.arange(12)
    ours = (places[None, None, :] >= first[:, :, None]) & (places[None, None, :] < end[:, :, None])
    sees = visible.any(axis=2)
    np.testing.assert_array_equal(ours[sees], visible[sees])
    assert (ours.sum(axis=2)[~sees] == 1).all()  # something, so that nothing is divided by zero


@pytest.mark.parametrize(
    ("segments", "real"),
    [(np.array([[1, 2, 1, 1]], np.int32), None), (None, np.array([[False, True, True, True]])), (np.array([[0, 1, 1, 0]], np.int32), None)],
)
def test_rows_that_ranges_cannot_say_are_known(segments, real):
    real, segments = (None if part is None else jnp.asarray(part) for part in (real, segments))
    assert not key_ranges((1, 4), 2, real, segments)[2].any()


def test_which_kernel_serves_what(hopper, monkeypatch):
    query = jax.ShapeDtypeStruct((2, 256, 8, 128), jnp.bfloat16)
    assert not needs_ranges(None, REAL, None) and not needs_ranges(3, None, None)
    assert needs_ranges(3, REAL, None) and needs_ranges(None, None, SEGMENTS)
    assert why_not(query, True, True) is None and why_not(query, True, False) is None
    assert "whole rows" in str(why_not(query, False, False))
    assert "float32" in str(why_not(query.update(dtype=jnp.float32), True, False))
    assert "heads of 100" in str(why_not(query.update(shape=(2, 256, 8, 100)), True, False))
    assert "rows of 200" in str(why_not(query.update(shape=(2, 200, 8, 128)), True, True))
    monkeypatch.setattr(attention_cuda, "gpu_capability", lambda: 8.0)
    assert why_not(query, True, False) is None and "Hopper" in str(why_not(query, True, True))
    monkeypatch.setattr(attention_cuda, "gpu_capability", lambda: 7.5)
    assert "begin at 8.0" in str(why_not(query, True, False))


def test_without_a_gpu_there_is_no_kernel():
    assert why_not(jax.ShapeDtypeStruct((2, 256, 8, 128), jnp.bfloat16), True, False) == "there is no NVIDIA GPU"


@pytest.fixture
def cudnn(hopper, monkeypatch):
    """jax asks the GPU's own libraries whether cuDNN is there before it lowers; the answer here is made up, the lowering is not."""
    from jax._src.cudnn import fused_attention_stablehlo as module

    monkeypatch.setattr(module, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91000))
    monkeypatch.setattr(module, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(module, "is_cuda_compute_capability_equal", lambda capability: False)


def lower_gradient(packed: bool, window=None, real=False) -> str:
    query, key = (jax.ShapeDtypeStruct((2, 1024, heads, 128), jnp.bfloat16) for heads in (8, 2))
    segments, is_real = (jax.ShapeDtypeStruct((2, 1024), kind) for kind in (jnp.int32, jnp.bool_))

    def loss(query, key, value, segments, is_real):
        given = {"segments": segments if packed else None, "key_is_real": is_real if real else None}
        return jnp.sum(attend_cuda(query, key, value, window=window, **given).astype(jnp.float32))

    checks = [export.DisabledSafetyCheck.custom_call(name) for name in KERNELS]
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    return export.export(gradient, platforms=["cuda"], disabled_checks=checks)(query, key, key, segments, is_real).mlir_module()


def check_kernels(text: str, expected: list[str]) -> None:
    assert sorted(re.findall(r"custom_call @([\w$]+)", text)) == expected
    assert "1024x1024x" not in text  # neither scores nor a mask


@pytest.mark.parametrize(("window", "real"), [(None, False), (256, False), (None, True)])
def test_whole_rows_are_cudnns(cudnn, window, real):
    check_kernels(lower_gradient(False, window, real), ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"])


@needs_tokamax
@pytest.mark.filterwarnings("ignore:The out_shape and scratch_shapes:DeprecationWarning")  # tokamax 0.0.12 with jax 0.10
@pytest.mark.parametrize(("packed", "window", "real"), [(True, None, False), (True, 256, True), (False, 256, True)])
def test_packed_rows_are_tokamaxs(hopper, packed, window, real):
    with jax.numpy_rank_promotion("allow"):  # tokamax's own
        check_kernels(lower_gradient(packed, window, real), ["mosaic_gpu_v2"] * 3)


def test_packed_rows_without_tokamax_name_the_extra(hopper, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention.pallas_mosaic_gpu", None)
    with pytest.raises(UserError, match=r'packed rows.*needs tokamax.*pip install "moejax\[cuda\]"'):
        lower_gradient(True)
    assert platforms.gpu_capability() == 9.0
