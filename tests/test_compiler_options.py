"""What XLA is asked for: options that the installed compilers know, on the platforms that they are for."""

import re

import jax
import pytest
from jax import numpy as jnp
from jax.sharding import SingleDeviceSharding

from moejax.compiler_options import GPU, TPU, options_for


def test_options_per_platform():
    assert options_for("tpu") == TPU
    assert options_for("gpu") == options_for("cuda") == GPU
    assert options_for("cpu") == options_for("rocm") == {}
    assert all(options_for(platform, "default") == {} for platform in ("tpu", "gpu", "cuda", "cpu"))


def test_who_changes_what_he_got_changes_nothing_else():
    options_for("tpu").clear()
    assert options_for("tpu") == TPU != {}


def test_names_say_whose_they_are():
    assert all(re.match("xla_gpu_", name) for name in GPU)
    assert all(re.match("xla_tpu_|xla_enable_|xla_latency", name) for name in TPU)


def test_xla_refuses_a_name_that_it_does_not_know():
    """Without this the next test could not fail."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options={"xla_gpu_no_such_option": True})


@pytest.mark.parametrize("name", GPU)
def test_xla_knows_the_gpu_s_options(name):
    """They are fields of options that all platforms read."""
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options={name: GPU[name]})
    assert compiled(jnp.ones(3)).sum() == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TPU, "xla_tpu_no_such_option"])
def test_libtpu_knows_the_tpu_s_options(name):
    pytest.importorskip("libtpu")
    from moejax.planning.topology import open_topology

    device = open_topology("v5p:2x2x1").devices[0]
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(device)))
    if name in TPU:
        lowered.compile(compiler_options={name: TPU[name]})
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=name):
            lowered.compile(compiler_options={name: True})
