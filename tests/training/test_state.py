"""What the optimiser does to which weight, and the learning rate at the steps that matter."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from moejax.config import ModelConfig, TrainConfig
from moejax.families.arctic import ARCTIC_480B
from moejax.families.layout import flatten_leaves
from moejax.families.mixtral import MIXTRAL_8X7B, MIXTRAL_8X22B
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


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_the_learning_rate_warms_up_to_its_peak_and_ends_as_said(schedule):
    rate = learning_rate_schedule(dataclasses.replace(SCHEDULE, schedule=schedule), 2.0)
    rates = np.array([float(rate(step)) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)  # no step is wasted on a rate of 0
    assert rates[10] == pytest.approx(2.0)
    assert rates[99] == pytest.approx(2.0 if schedule == "constant" else 0.1)
    assert (np.diff(rates[10:]) <= 0).all()
    assert np.abs(np.diff(rates)).max() <= 2.0 / 10 + 1e-6  # no jumps: nothing is steeper than the warm-up


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("wsd", {10: 2.0, 79: 2.0, 80: 1.905, 89: 1.05, 98: 0.195, 99: 0.1}),  # 20 steps of decay, each 1.9 / 20
        ("linear", {10: 2.0, 54: 2.0 - 1.9 * 44 / 89, 99: 0.1}),
        ("cosine", {10: 2.0, 99: 0.1, 54: 0.1 + 1.9 * (1 + np.cos(np.pi * 44 / 89)) / 2}),
        ("constant", {10: 2.0, 54: 2.0, 99: 2.0}),
    ],
)
def test_the_learning_rate_at_the_steps_that_matter(schedule, expected):
    rate = learning_rate_schedule(dataclasses.replace(SCHEDULE, schedule=schedule), 2.0)
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("fraction", "first_below"), [(0.0, None), (0.01, 99), (0.5, 50), (1.0, 11)])
def test_the_share_of_the_steps_that_decay(fraction, first_below):
    """A decay longer than what the warm-up leaves begins right behind it; a decay of no step leaves the rate where it is."""
    rate = learning_rate_schedule(dataclasses.replace(SCHEDULE, schedule="wsd", decay_fraction=fraction), 2.0)
    below = [step for step in range(10, 100) if float(rate(step)) < 2.0 - 1e-6]
    assert below[:1] == ([] if first_below is None else [first_below])
    assert float(rate(99)) == pytest.approx(2.0 if first_below is None else 0.1)


def test_a_run_that_follows_its_stages_says_how_long_it_is():
    """TrainConfig.steps is None there."""
    rate = learning_rate_schedule(dataclasses.replace(SCHEDULE, steps=None, schedule="linear"), 2.0, 1000)
    assert float(rate(99)) > 1.5
    assert float(rate(999)) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 20), (5, 4), (3, 0)])
def test_short_runs_have_a_learning_rate_too(steps, warmup, schedule):
    rate = learning_rate_schedule(TrainConfig(steps=steps, warmup_steps=warmup, schedule=schedule), 1.0)
    rates = np.array([float(rate(step)) for step in range(steps)])
    assert (rates > 0).all()
    assert rates.max() == pytest.approx(1.0)


@pytest.mark.parametrize(("optimizer", "mask"), [("adamw", decay_mask), ("lion", decay_mask), ("adafactor", decay_mask), ("muon", None)])
def test_without_a_gradient_only_decay_moves_anything(optimizer, mask):
    config = TrainConfig(optimizer=optimizer, warmup_steps=0, learning_rate=0.5, weight_decay=0.1)
    transformation = create_optimizer(config)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_parameters(dataclasses.replace(CONFIG, router_bias=True)))
    zeros = jax.tree.map(jnp.zeros_like, ones)
    updates = jax.jit(lambda: transformation.update(zeros, transformation.init(ones), ones)[0])()
    moved = names_where(updates, lambda update: bool(update.any()))
    if mask is None:
        assert moved == names_where(muon_dimensions(ones), lambda dimensions: dimensions is not None)
    else:
        assert moved == names_where(decay_mask(ones), lambda decays: decays)
    assert moved
    for leaf in jax.tree.leaves(updates):  # times the learning rate, as in AdamW; so Adafactor, whose decay in optax.adafactor is not
        assert not leaf.any() or np.allclose(leaf, -0.5 * 0.1, rtol=1e-5)


@pytest.mark.parametrize("preset", [ARCTIC_480B, MIXTRAL_8X7B, MIXTRAL_8X22B], ids=lambda config: f"{config.family}_{config.num_layers}")
def test_adafactor_factors_the_matrices_of_published_models(preset):
    """One number a row and one a column of each matrix, layer by layer and expert by expert: next to nothing."""
    params = abstract_parameters(preset)
    state = jax.eval_shape(create_optimizer(TrainConfig(optimizer="adafactor")).init, params)
    (moments,) = [part for part in jax.tree.leaves(state, is_leaf=lambda part: hasattr(part, "v_row")) if hasattr(part, "v_row")]
    rows, columns = flatten_leaves(moments.v_row), flatten_leaves(moments.v_col)
    experts = ("layers", "block_0", "moe", "down", "kernel")
    layers, number, width = preset.num_layers, preset.num_experts, preset.intermediate_size
    assert {rows[experts].shape, columns[experts].shape} == {(layers, number, preset.hidden_size), (layers, number, width)}
    for path, leaf in flatten_leaves(params).items():
        if path[-1] != "scale" and "router" not in path:
            assert {rows[path].shape, columns[path].shape} == {leaf.shape[:-1], (*leaf.shape[:-2], leaf.shape[-1])}
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 0.002 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_adafactor_follows_its_formula():
    """Two steps on one matrix large enough to be factored, written out (Shazeer & Stern 2018, algorithm 4, without parameter scale)."""
    config = TrainConfig(optimizer="adafactor", warmup_steps=0, schedule="constant", learning_rate=0.1, weight_decay=0.0, clip_norm=1e9)
    transformation = create_optimizer(config)
    keys = jax.random.split(jax.random.key(0), 2)
    gradients = [np.asarray(jax.random.normal(key, (128, 160))) * scale for key, scale in zip(keys, (1.0, 9.0), strict=True)]
    tree = {"up": {"kernel": jnp.zeros((128, 160))}}
    state, rows, columns = transformation.init(tree), 0.0, 0.0
    for step, gradient in enumerate(gradients):
        updates, state = jax.jit(transformation.update)({"up": {"kernel": gradient}}, state, tree)
        decay = 1 - (step + 1) ** -0.8
        rows = decay * rows + (1 - decay) * np.mean(gradient**2, axis=1)
        columns = decay * columns + (1 - decay) * np.mean(gradient**2, axis=0)
        expected = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
        expected = expected / max(1.0, np.sqrt(np.mean(expected**2)))
        np.testing.assert_allclose(updates["up"]["kernel"], -0.1 * expected, rtol=1e-4, atol=1e-6)


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


@pytest.mark.slow
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
