"""The grouped matmul of NVIDIA GPUs: what it asks of its kernels, what it refuses, and what it lowers to. No GPU is here to run it."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import export, lax
from jax import numpy as jnp

from moejax.checks import UserError
from moejax.ops import grouped, grouped_cuda
from moejax.ops.grouped import SPARE_ROWS, grouped_matmul, grouped_matmul_cuda, grouped_matmul_reference

needs_tokamax = pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed (CONTRIBUTING.md)")


class Kernel:
    """Stands for tokamax's: the product it was asked for by `lax.ragged_dot_general`, and in rows of no group what memory may hold."""

    def __init__(self, config=None):
        self.config = config

    def bind(self, left, right, **arguments):
        return SimpleNamespace(default_config=SimpleNamespace(block_k=512), heuristics_config=SimpleNamespace(block_k=128))

    def replace(self, config):
        return Kernel(config)

    def __call__(self, left, right, group_sizes, ragged_dot_dimension_numbers, preferred_element_type):
        assert left.shape[0] % grouped_cuda.ROW_MULTIPLE == 0
        out = lax.ragged_dot_general(left, right, group_sizes, ragged_dot_dimension_numbers, preferred_element_type=preferred_element_type)
        if out.ndim == 3:
            return out
        assert self.config is not None and left.shape[1] % self.config.block_k == 0, "the kernels drop what no block reaches"
        return jnp.where((jnp.arange(out.shape[0]) < jnp.sum(group_sizes))[:, None], out, jnp.nan)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(grouped_cuda, "import_tokamax", lambda *_: SimpleNamespace(PallasMosaicGpuRaggedDot=Kernel))


def make(sizes, inside=256, outside=128, dtype=jnp.bfloat16, spare=SPARE_ROWS):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (sum(sizes) + spare, inside), dtype)
    weights = jax.random.normal(keys[1], (len(sizes), outside, inside), dtype) * jnp.asarray(inside**-0.5, dtype)
    mine = (jnp.arange(x.shape[0]) < sum(sizes))[:, None]
    cotangent = jnp.where(mine, jax.random.normal(keys[2], (x.shape[0], outside), dtype), 0)
    return x, weights, jnp.array(sizes, jnp.int32), cotangent


@pytest.mark.parametrize("sizes", [[1, 31, 0, 67], pytest.param([0, 0, 9], marks=pytest.mark.slow)])
def test_products_and_gradients_are_the_references(stub, sizes):
    """The three contractions, rows padded, a tuned block that does not fit, and NaN where the kernels leave memory as it was."""
    x, weights, group_sizes, cotangent = make(sizes)

    def run(function, *given):
        value, pull = jax.vjp(lambda x, w: function(x, w, *given), x, weights)
        return value, *pull(cotangent)

    rows = slice(0, sum(sizes))
    ours = jax.jit(lambda: run(grouped_matmul_cuda, group_sizes, SPARE_ROWS))()
    theirs = run(grouped_matmul_reference, group_sizes)
    np.testing.assert_allclose(*(np.asarray(found[0][rows], np.float32) for found in (ours, theirs)), atol=0.03)
    np.testing.assert_allclose(*(np.asarray(found[1][rows], np.float32) for found in (ours, theirs)), atol=0.03)
    np.testing.assert_allclose(*(np.asarray(found[2], np.float32) for found in (ours, theirs)), atol=0.25)  # sums of up to 130 terms
    assert all(np.isfinite(np.asarray(found, np.float32)).all() for found in ours)


@pytest.mark.parametrize("case", [{"dtype": jnp.float32}, {"inside": 160}, {"outside": 192}])
def test_what_the_kernels_do_not_fit_is_looped_over_and_said(stub, capsys, case):
    x, weights, group_sizes, _ = make([5, 40, 0, 3], **case)
    grouped.say_once.cache_clear()
    out = grouped_matmul_cuda(x, weights, group_sizes, SPARE_ROWS)
    np.testing.assert_allclose(
        np.asarray(out[:48], np.float32), np.asarray(grouped_matmul_reference(x, weights, group_sizes)[:48], np.float32), atol=0.05
    )
    assert "a loop over blocks of rows, not tokamax's kernels; " in capsys.readouterr().err


def test_an_older_gpu_is_looped_over(monkeypatch):
    monkeypatch.setattr(grouped_cuda, "gpu_capability", lambda: 7.5)
    assert "compute capability 7.5" in str(grouped_cuda.why_not(128, 128, jnp.bfloat16))
    monkeypatch.setattr(grouped_cuda, "gpu_capability", lambda: 9.0)
    assert grouped_cuda.why_not(128, 128, jnp.bfloat16) is None


def lower(function, *arguments, platform="cuda"):
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    return export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(*arguments).mlir_module()


def loss(x, weights, sizes):
    return jnp.sum(grouped_matmul(x, weights, sizes, SPARE_ROWS).astype(jnp.float32))


def test_without_tokamax_lowering_for_a_gpu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.ragged_dot.pallas_mosaic_gpu", None)
    x, weights, sizes, _ = make([64, 48])
    for function in (grouped_matmul, jax.grad(loss, (0, 1))):
        with pytest.raises(UserError, match=r'needs tokamax.*pip install "moejax\[cuda\]"'):
            lower(function, x, weights, sizes)
        for platform in ("cpu", "tpu"):
            assert lower(function, x, weights, sizes, platform=platform)


def test_float32_on_a_gpu_does_only_the_rows_own_work():
    x, weights, sizes, _ = make([64, 48], dtype=jnp.float32)
    text = lower(jax.grad(loss, (0, 1)), x, weights, sizes)
    assert "chlo.ragged_dot" not in text
    assert "stablehlo.while" in text


@needs_tokamax
@pytest.mark.filterwarnings("ignore:The out_shape and scratch_shapes:DeprecationWarning")  # tokamax 0.0.12 with jax 0.10
def test_lowered_for_hopper_it_is_three_kernels_and_nothing_dense(hopper):
    x, weights, sizes, _ = make([64, 48, 0, 16])
    forward, backward = lower(grouped_matmul, x, weights, sizes), lower(jax.grad(loss, (0, 1)), x, weights, sizes)
    assert forward.count("custom_call @mosaic_gpu_v2") == 1
    assert backward.count("custom_call @mosaic_gpu_v2") >= 2  # the loss's own value is not needed for its gradients
    for text in (forward, backward):
        assert "chlo.ragged_dot" not in text
        assert "stablehlo.dot_general" not in text


@needs_tokamax
def test_flags_of_a_command_are_none_of_tokamaxs(hopper):
    """tokamax reads sys.argv when nobody has, and ends at a flag it does not know."""
    code = "from moejax.ops.platforms import import_tokamax\nfrom tokamax import config\n"
    code += "import_tokamax('tokamax._src.ops.ragged_dot.base', 'a test')\nprint(config.cross_compile.value)"
    result = subprocess.run([sys.executable, "-c", code, "configs/tiny.py", "--train.steps", "3"], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
