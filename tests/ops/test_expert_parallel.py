"""Experts on several devices: every way of getting rows to them is the dense reference, whatever the routing."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.ops.capacity import assign_slots, choose_experts
from moejax.ops.dispatch import apply_experts_dense
from moejax.ops.expert_mlp import ExpertWeights
from moejax.ops.expert_parallel import apply_gathered, apply_ragged, apply_slots
from moejax.ops.routing import Routing

DEVICES, EXPERTS, SIZE, WIDTH, ROWS = 4, 8, 16, 24, 40
KINDS = {"gathered": apply_gathered, "ragged": apply_ragged}


def make_problem(routing: str, per_token: int = 2):
    rng = np.random.default_rng(7)
    weights = ExpertWeights(
        *(jnp.asarray(rng.normal(size=shape), jnp.float32) * 0.3 for shape in ((EXPERTS, WIDTH, SIZE),) * 2 + ((EXPERTS, SIZE, WIDTH),))
    )
    x = jnp.asarray(rng.normal(size=(ROWS, SIZE)), jnp.float32)
    experts = {
        "random": np.stack([rng.permutation(EXPERTS)[:per_token] for _ in range(ROWS)]),
        "all to one device": np.tile([6, 7][:per_token], (ROWS, 1)),
        "one expert with none": np.stack([rng.permutation(EXPERTS - 1)[:per_token] for _ in range(ROWS)]),
        "by device": np.stack([(np.arange(per_token) + 2 * (row // 10)) % EXPERTS for row in range(ROWS)]),
    }[routing]
    shares = rng.uniform(0.1, 1, size=experts.shape)
    return x, Routing(jnp.asarray(shares / shares.sum(1, keepdims=True), jnp.float32), jnp.asarray(experts, jnp.int32)), weights


@functools.cache
def mesh():
    return jax.make_mesh((DEVICES,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def sharded(function):
    """`function` of the rows and experts of each device; its dropped choices are summed."""

    def local(x, routing, weights):
        y, dropped = function(x, routing, weights, "expert")
        return y, jax.lax.psum(dropped, "expert")

    spec = P("expert")
    return jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=(spec, spec, spec), out_specs=(spec, P()), check_vma=False))


@functools.cache
def compiled(kind):
    apply = sharded(KINDS[kind])

    def objective(x, shares, experts, weights, target):
        return jnp.sum(apply(x, Routing(shares, experts), weights)[0] * target)

    return apply, jax.jit(jax.grad(objective, argnums=(0, 1, 3)))


def assert_close(actual, expected):
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(actual, expected, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("routing", ["random", "all to one device", "one expert with none", "by device"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_dense_reference(kind, routing):
    x, choices, weights = make_problem(routing)
    apply, gradient = compiled(kind)
    y, dropped = apply(x, choices, weights)
    assert int(dropped) == 0
    assert_close(y, apply_experts_dense(x, choices, weights))
    target = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    reference = jax.grad(lambda x, s, w: jnp.sum(apply_experts_dense(x, Routing(s, choices.experts), w) * target), argnums=(0, 1, 2))
    for ours, theirs in zip(
        jax.tree.leaves(gradient(x, *choices, weights, target)), jax.tree.leaves(reference(x, choices.weights, weights)), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_no_expert_is_no_work(kind):
    """Rows of padding choose the expert past the last one: they get zeros, and the others what they get without them."""
    x, choices, weights = make_problem("random")
    left_out = jnp.arange(ROWS) % 3 == 0
    partly = Routing(choices.weights, jnp.where(left_out[:, None], EXPERTS, choices.experts))
    y, _ = compiled(kind)[0](x, partly, weights)
    assert_close(y, jnp.where(left_out[:, None], 0, apply_experts_dense(x, choices, weights)))


def test_buffers_of_more_entries_than_an_index_counts_can_be_traced():
    """4 devices x 2^19 choices x 2,048 entries: as of rows of 32,768 tokens on a pod."""
    shape = jax.ShapeDtypeStruct
    x, shares, experts = shape((2**20, 2048), jnp.bfloat16), shape((2**20, 2), jnp.float32), shape((2**20, 2), jnp.int32)
    wide, narrow = shape((EXPERTS, WIDTH, 2048), jnp.bfloat16), shape((EXPERTS, 2048, WIDTH), jnp.bfloat16)
    y, _ = jax.eval_shape(
        lambda *parts: sharded(apply_ragged)(parts[0], Routing(*parts[1:3]), ExpertWeights(*parts[3:])),
        x,
        shares,
        experts,
        wide,
        wide,
        narrow,
    )
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


def test_a_full_buffer_drops_and_counts():
    x, choices, weights = make_problem("all to one device")
    y, dropped = sharded(functools.partial(apply_ragged, buffer_factor=2.0))(x, choices, weights)
    sent = ROWS * 2
    assert int(dropped) == sent - 2 * sent // DEVICES
    # The first two devices' rows found room, the others' did not.
    expected = apply_experts_dense(x, choices, weights)
    assert_close(y[: ROWS // 2], expected[: ROWS // 2])
    assert float(jnp.max(jnp.abs(y[ROWS // 2 :]))) == 0
    even, none = sharded(functools.partial(apply_ragged, buffer_factor=2.0))(*make_problem("random"))
    assert int(none) == 0
    assert_close(even, apply_experts_dense(*make_problem("random")))


@pytest.mark.parametrize("per_token", [1, 2])
def test_slots_of_each_shard_are_the_single_device_path_on_its_rows(per_token):
    x, _, weights = make_problem("random")
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, EXPERTS)), jnp.float32)
    capacity = 3 - 2 // per_token

    def apply(x, logits, weights, axis):
        slots = assign_slots(choose_experts(logits, per_token), EXPERTS, capacity)
        return apply_slots(x, slots, weights, axis)

    def summed(x, logits, weights):
        parts = [apply(x[r : r + 10], logits[r : r + 10], weights, None) for r in range(0, ROWS, 10)]
        return jnp.concatenate([y for y, _ in parts]), sum(dropped for _, dropped in parts)

    def objective(function, x, logits, weights):
        y, dropped = function(x, logits, weights)
        return jnp.sum(jnp.sin(y)), (y, dropped)

    results = [
        jax.jit(jax.value_and_grad(functools.partial(objective, function), argnums=(0, 1, 2), has_aux=True))(x, logits, weights)
        for function in (sharded(apply), summed)
    ]
    assert int(results[0][0][1][1]) == int(results[1][0][1][1]) > 0
    for ours, theirs in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        assert_close(ours, theirs)
