"""What the optimiser does to which weight, and the learning rate at the steps that matter."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from moejax.config import ModelConfig, TrainConfig
from moejax.families.layout import flatten_leaves
from moejax.model.transformer import Transformer, abstract_parameters
from moejax.training.state import (
    abstract_state,
    create_optimizer,
    create_state,
    decay_mask,
    learning_rate_schedule,
    muon_dimensions,
)

# Layers 0 and 2 are dense, 1 holds experts; layer 2 does not fill a period and is not stacked.
CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1, num_experts=4, moe_every=2
)
PARAMETERS = abstract_parameters(CONFIG)


def names_where(tree, wanted) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: not isinstance(leaf, dict))
    return {"/".join(entry.key for entry in path) for path, leaf in leaves if wanted(leaf)}


def test_the_tree_has_what_these_tests_are_about():
    names = {"/".join(path) for path in flatten_leaves(PARAMETERS)}
    assert {
        "embed/embedding",
        "head/kernel",
        "layers/block_1/moe/gate/kernel",
        "layers/block_0/mlp/up/kernel",
        "layer_2/mlp/up/kernel",
    } <= names


def test_norms_and_router_do_not_decay():
    undecayed = names_where(decay_mask(PARAMETERS), lambda decays: not decays)
    expected = {"/".join(path) for path in flatten_leaves(PARAMETERS) if path[-1] == "scale" or "router" in path}
    assert undecayed == expected
    assert {"final_norm/scale", "layers/block_1/moe/router/kernel", "layer_2/mlp_norm/scale"} <= undecayed


def test_muon_takes_the_matrices_of_the_layers():
    left_to_adamw = names_where(muon_dimensions(PARAMETERS), lambda dimensions: dimensions is None)
    expected = {
        "/".join(path) for path in flatten_leaves(PARAMETERS) if path[-1] == "scale" or path[0] in ("embed", "head") or "router" in path
    }
    assert left_to_adamw == expected


@pytest.mark.parametrize(
    ("path", "axes"),
    [
        ("layers/block_1/moe/down/kernel", (2, 3)),  # [periods, experts, out, in]
        ("layers/block_0/attention/query/kernel", (1, 2)),  # [periods, out, in]
        ("layer_2/mlp/gate/kernel", (0, 1)),  # [out, in]
    ],
)
def test_muon_s_matrix_is_the_last_two_axes(path, axes):
    dimensions = muon_dimensions(PARAMETERS)
    for name in path.split("/"):
        dimensions = dimensions[name]
    assert (dimensions.output_axis, dimensions.reduction_axis) == axes


def test_muon_of_stacked_experts_is_muon_of_each_matrix():
    config = TrainConfig(optimizer="muon", steps=10, warmup_steps=0, clip_norm=1e9, weight_decay=0.1)
    optimizer = create_optimizer(config)
    keys = jax.random.split(jax.random.key(0), 2)
    weight, gradient = (jax.random.normal(key, (2, 3, 12, 8)) for key in keys)

    @jax.jit
    def update(weight, gradient):
        tree = {"moe": {"gate": {"kernel": weight}}}
        state = optimizer.init(tree)
        for _ in range(2):  # the second step has momentum
            updates, state = optimizer.update({"moe": {"gate": {"kernel": gradient}}}, state, tree)
        return updates["moe"]["gate"]["kernel"]

    stacked = update(weight, gradient)
    for layer in range(2):
        for expert in range(3):
            alone = update(weight[layer, expert], gradient[layer, expert])
            np.testing.assert_allclose(stacked[layer, expert], alone, atol=1e-6)
    # Orthogonalised: all singular values of the update are near one another, unlike the gradient's.
    singular = np.linalg.svd(np.asarray(update(jnp.zeros((12, 8)), gradient[0, 0])), compute_uv=False)
    assert singular.max() / singular.min() < 2


SCHEDULE = TrainConfig(steps=100, warmup_steps=10, final_learning_rate_fraction=0.05)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_warms_up_to_its_peak_and_ends_as_said(schedule):
    rate = learning_rate_schedule(dataclasses.replace(SCHEDULE, schedule=schedule), 2.0)
    rates = np.array([float(rate(step)) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)  # no step is wasted on a rate of 0
    assert rates[10] == pytest.approx(2.0)
    assert rates[99] == pytest.approx(2.0 if schedule == "constant" else 0.1)
    assert (np.diff(rates[10:]) <= 0).all()


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 20), (5, 4), (3, 0)])
def test_short_runs_have_a_learning_rate_too(steps, warmup):
    rate = learning_rate_schedule(TrainConfig(steps=steps, warmup_steps=warmup), 1.0)
    rates = np.array([float(rate(step)) for step in range(steps)])
    assert (rates > 0).all()
    assert rates.max() == pytest.approx(1.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fresh_state_has_the_parameters_type_and_the_announced_shapes(optimizer):
    model = Transformer(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
    transformation = create_optimizer(TrainConfig(optimizer=optimizer))
    state = create_state(model, transformation, seed=1)
    assert int(state.step) == 0
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
    announced = abstract_state(model, transformation)
    assert jax.tree.structure(announced) == jax.tree.structure(state)
    for ours, expected in zip(jax.tree.leaves(state), jax.tree.leaves(announced), strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)


def test_the_seed_decides_the_weights():
    model, optimizer = Transformer(CONFIG), create_optimizer(TrainConfig())
    states = [create_state(model, optimizer, seed).params for seed in (0, 0, 1)]
    same = [jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), states[0], other)) for other in states[1:]]
    assert same == [True, False]


def test_gradients_are_clipped_by_their_global_norm():
    config = TrainConfig(clip_norm=0.5, warmup_steps=0)
    optimizer = create_optimizer(config)
    tree = {"embed": {"embedding": jnp.zeros((4, 4))}}
    _, state = optimizer.update({"embed": {"embedding": jnp.full((4, 4), 100.0)}}, optimizer.init(tree), tree)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.tree.norm(first_moment)) == pytest.approx(0.5 * (1 - config.beta_1), rel=1e-5)
