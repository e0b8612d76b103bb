"""Functions that are traced when a program is lowered, and never for a device it is not lowered for."""

import functools

import jax
import numpy as np
import pytest
from jax import export, lax
from jax import numpy as jnp

from moejax.checks import UserError
from moejax.ops import platforms
from moejax.ops.platforms import gpu_capability, import_tokamax, say_once, trace_at_lowering


def refuse(x):
    raise UserError("not on this device")


def choose(x):
    cuda = functools.partial(trace_at_lowering, refuse, like=x)
    return lax.platform_dependent(x, cpu=jnp.sin, cuda=cuda, default=jnp.cos)


def test_another_devices_branch_is_not_traced():
    x = jnp.arange(3.0)
    np.testing.assert_allclose(choose(x), jnp.sin(x))
    np.testing.assert_allclose(jax.jit(choose)(x), jnp.sin(x))
    export.export(jax.jit(choose), platforms=["tpu"])(x)
    with pytest.raises(UserError, match="not on this device"):
        export.export(jax.jit(choose), platforms=["cuda"])(x)


def test_it_runs_and_its_result_has_the_structure_it_was_said_to_have():
    def both(x, scale):
        return {"sum": jnp.sum(x) * scale, "all": x * scale}

    x, scale = jnp.arange(4.0), jnp.float32(2.0)
    like = {"sum": scale, "all": x}
    found = jax.jit(lambda x, scale: trace_at_lowering(both, x, scale, like=like))(x, scale)
    np.testing.assert_allclose(found["all"], 2 * x)
    assert float(found["sum"]) == 12.0
    assert float(trace_at_lowering(both, x, scale, like=like)["sum"]) == 12.0
    with pytest.raises(TypeError, match="was said to give"):
        jax.jit(lambda x: trace_at_lowering(jnp.sum, x, like=x))(x)


def test_a_gpu_tells_its_capability(hopper):
    assert gpu_capability() == 9.0


def test_without_a_gpu_there_is_none():
    assert gpu_capability() is None


def test_a_missing_package_is_one_line():
    with pytest.raises(UserError, match=r'^a test needs tokamax.*; pip install "moejax\[cuda\]"$'):
        import_tokamax("no_such_package", "a test")


def test_what_is_said_is_said_once(capsys):
    platforms.say_once.cache_clear()
    for _ in range(3):
        say_once("by blocks")
    assert capsys.readouterr().err == "by blocks\n"
