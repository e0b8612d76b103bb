"""A model on a mesh is the model on one device: outputs, losses and gradients, for every way of reaching the experts."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.config import ModelConfig
from moejax.model.partition import parameter_shardings, shardings_like
from moejax.model.transformer import Transformer, head_weight, init_parameters
from moejax.training.head_loss import head_cross_entropy, head_token_losses

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_layers": 2, "num_heads": 8, "num_kv_heads": 8, "num_experts": 8,
    "max_length": 64, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "arctic": ModelConfig(**SIZES, attention_window=6),
    "mixtral": ModelConfig(
        **SIZES, family="mixtral", residual_mlp=False, top_1_weight="one", router_aux_loss_kind="pooled", router_aux_loss_coefficient=0.02
    ),
}
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "expert 8": {"expert": 8},
    "data 2, expert 4": {"data": 2, "expert": 4},
    "expert 4, tensor 2": {"expert": 4, "tensor": 2},
    "fsdp 2, context 4": {"fsdp": 2, "context": 4},
    "data 2, fsdp 2, expert 2": {"data": 2, "fsdp": 2, "expert": 2},
    "expert 2, context 2, tensor 2": {"expert": 2, "context": 2, "tensor": 2},
    "tensor 8": {"tensor": 8},
}


def mesh_of(name):
    return moejax.make_mesh(**{"fsdp": 1} | MESHES[name])


@functools.cache
def parameters(family):
    return init_parameters(Transformer(FAMILIES[family]), jax.random.key(3))


@functools.cache
def batch(rows=8, length=16):
    """Packed rows of two documents, the last one ending in padding; some targets do not count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SIZES["vocab_size"], (rows, length + 1)).astype(np.int32)
    segments = np.repeat([[1] * 7 + [2] * (length - 7)], rows, axis=0).astype(np.int32)
    segments[-1, -3:] = 0
    positions = np.concatenate([np.arange(7), np.arange(length - 7)])
    weights = (rng.uniform(size=(rows, length)) > 0.2).astype(np.float32) * (segments > 0)
    return tokens[:, :-1], tokens[:, 1:], weights, segments, np.repeat(positions[None, :], rows, axis=0).astype(np.int32)


def value_and_gradients(config, mesh, params, inputs):
    """((total, logits, dropped), gradients) of cross-entropy and router losses."""
    model = Transformer(config, mesh)
    tokens, targets, weights, segments, positions = inputs

    def total(params):
        out = model.apply({"params": params}, tokens, positions=positions, segments=segments)
        ce = head_cross_entropy(mesh, out.features, head_weight(params), targets, weights / weights.sum())
        return ce + 0.1 * out.aux_loss + 0.01 * out.z_loss, (out.logits, out.dropped)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


@functools.cache
def on_one_device(family, rows=8, length=16):
    return value_and_gradients(FAMILIES[family], None, parameters(family), batch(rows, length))


def assert_close(ours, expected, real=None):
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        np.testing.assert_allclose(left, right, atol=2e-5 * max(float(np.max(np.abs(right))), 1e-3), rtol=0)


def check(family, mesh_name, kind, rows=8, length=16):
    mesh = mesh_of(mesh_name)
    config = dataclasses.replace(FAMILIES[family], dispatch=kind)
    params = jax.device_put(parameters(family), parameter_shardings(config, mesh))
    assert_close(value_and_gradients(config, mesh, params, batch(rows, length)), on_one_device(family, rows, length))


@pytest.mark.parametrize(
    ("mesh_name", "kind"),
    [("data 2, fsdp 2, expert 2", "ragged"), ("expert 2, context 2, tensor 2", "gather")],
)
@pytest.mark.slow
def test_a_mesh_changes_nothing(mesh_name, kind):
    check("arctic", mesh_name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gather", "ragged"])  # auto is one of them
@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mesh_and_dispatch_changes_nothing(family, mesh_name, kind):
    if kind != "gather" and MESHES[mesh_name].get("expert", 1) == 1:
        pytest.skip("with all experts on one device these are the same program")
    check(family, mesh_name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gather", "ragged"])
@pytest.mark.parametrize(("rows", "length"), [(5, 11), (1, 16)])
def test_sizes_that_do_not_divide_are_filled_up(rows, length, kind):
    check("arctic", "expert 2, context 2, tensor 2", kind, rows, length)
    check("mixtral", "data 2, expert 4", kind, rows, length)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_on_a_mesh_are_those_of_each_devices_rows(family):
    """Dispatch capacity counts slots per device: the same as the single-device path on each device's rows, drop for drop."""
    config = dataclasses.replace(FAMILIES[family], dispatch="capacity", capacity_factor=0.8, attention_window=None)
    mesh = mesh_of("data 2, expert 4")
    tokens = batch()[0]
    params = parameters(family)
    whole = jax.jit(lambda p: Transformer(config, mesh).apply({"params": p}, tokens))(params)
    alone = jax.jit(lambda p, rows: Transformer(config).apply({"params": p}, rows))
    parts = [alone(params, tokens[row : row + 1]) for row in range(8)]
    assert int(whole.dropped) == sum(int(part.dropped) for part in parts) > 0
    assert_close(whole.logits, np.concatenate([part.logits for part in parts]))


def test_weights_and_moments_are_divided():
    config, mesh = FAMILIES["arctic"], mesh_of("data 2, fsdp 2, expert 2")
    shardings = parameter_shardings(config, mesh)
    moe = shardings["layers"]["block_0"]["moe"]
    assert moe["gate"]["kernel"].spec == jax.sharding.PartitionSpec(None, "expert", None, "fsdp")
    assert moe["down"]["kernel"].spec == jax.sharding.PartitionSpec(None, "expert", "fsdp", None)
    assert shardings["embed"]["embedding"].spec == jax.sharding.PartitionSpec(None, "fsdp")
    import optax

    params = parameters("arctic")
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    placed = shardings_like(state, params, shardings, mesh)
    for moments in (placed[0].mu, placed[0].nu):
        assert jax.tree.leaves(moments) == jax.tree.leaves(shardings)
    assert placed[0].count.spec == jax.sharding.PartitionSpec()


def test_token_losses_on_a_mesh():
    mesh = mesh_of("expert 2, context 2, tensor 2")
    rng = np.random.default_rng(1)
    features, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 5, 8), (20, 8)))
    targets = jnp.asarray(rng.integers(0, 20, (3, 5)), jnp.int32)
    expected = head_token_losses(None, features, head, targets)
    np.testing.assert_allclose(head_token_losses(mesh, features, head, targets), expected, rtol=1e-5)
