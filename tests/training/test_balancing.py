"""Biases that balance experts: they even out a skewed router, and are nobody's business but the step's."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import moejax
from moejax.config import ModelConfig, TrainConfig
from moejax.data.rows import Batch
from moejax.families.layout import flatten_leaves
from moejax.model.transformer import Transformer, init_parameters, unstack_layers
from moejax.training.balancing import load_entropy, load_max_over_mean, move_biases, spare_biases, without_biases
from moejax.training.state import begin_state, create_optimizer
from moejax.training.step import StepOptions, train_step

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=8, residual_mlp=False,
    router_bias=True, router_aux_loss_coefficient=0.0, dispatch="dense",  # which compiles in a third of the time
)  # fmt: skip
OPTIONS = StepOptions(accumulation_steps=2, router_bias_rate=0.002)
BIAS = ("layers", "block_0", "moe", "router", "bias")
STILL = optax.GradientTransformation(lambda params: (), lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), state))
APPLY = jax.jit(lambda model, variables, tokens: model.apply(variables, tokens, return_routing=True), static_argnums=0)


def make_batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 64, (4, 65)).astype(np.int32)
    shape = (4, 64)
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.float32), np.ones(shape, np.int32), positions)


@pytest.fixture(scope="module")
def skewed():
    """Parameters whose routers send most tokens to the first experts: every token has something in common, which they like."""
    params = jax.jit(init_parameters, static_argnums=0)(Transformer(CONFIG), jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 2)
    embedding = 1.0 + jax.random.normal(keys[0], (64, 16))
    liking = jnp.linspace(0.1, -0.1, 8)[None, :, None]
    router = {"kernel": liking + 0.1 * jax.random.normal(keys[1], (2, 8, 16)), "bias": jnp.zeros((2, 8))}
    block = params["layers"]["block_0"]
    return params | {"embed": {"embedding": embedding}, "layers": {"block_0": block | {"moe": block["moe"] | {"router": router}}}}


def run(model, params, steps, options, optimizer=STILL):
    state, seen = begin_state(model, optimizer, params), []
    for _ in range(steps):
        state, metrics = train_step(model, optimizer, state, make_batch(), options)
        seen.append(metrics)
    return state, seen


@pytest.fixture(scope="module")
def balanced(skewed):
    """120 steps in which nothing moves but the biases: (state, metrics of each)."""
    return run(Transformer(CONFIG), skewed, 120, OPTIONS)


def test_a_skewed_router_is_evened_out(balanced):
    first, last = balanced[1][0], balanced[1][-1]
    assert all(first["expert_load_max_over_mean"] > 2)
    assert all(last["expert_load_max_over_mean"] < 1.4)
    assert all(first["expert_load_entropy_per_layer"] < 0.9)
    assert all(last["expert_load_entropy_per_layer"] > 0.98)


def test_nothing_moves_but_the_biases(balanced, skewed):
    after, before = flatten_leaves(balanced[0].params), flatten_leaves(skewed)
    assert {path for path in before if not np.array_equal(after[path], before[path])} == {BIAS}
    assert after[BIAS].dtype == jnp.float32


def test_unrolled_layers_balance_alike(balanced, skewed):
    unrolled = dataclasses.replace(CONFIG, scan_layers=False)
    state, _ = run(Transformer(unrolled), unstack_layers(skewed, unrolled), 3, OPTIONS._replace(accumulation_steps=1))
    stacked, _ = run(Transformer(CONFIG), skewed, 3, OPTIONS)
    for layer in range(2):
        bias = state.params[f"layer_{layer}"]["moe"]["router"]["bias"]
        assert np.abs(bias).max() == pytest.approx(3 * OPTIONS.router_bias_rate)
        np.testing.assert_array_equal(bias, flatten_leaves(stacked.params)[BIAS][layer])


def test_a_poisoned_step_moves_no_bias(skewed):
    batch = make_batch()
    batch.weights[0, 0] = np.nan
    state = begin_state(Transformer(CONFIG), STILL, skewed)
    state, metrics = train_step(Transformer(CONFIG), STILL, state, batch, OPTIONS)
    assert int(metrics["skipped_steps"]) == 1
    assert not flatten_leaves(state.params)[BIAS].any()


def test_biases_go_against_the_load_layer_by_layer():
    """Layers 1 and 3 of four hold experts, and lie in the last block of each period; or apart."""
    config = dataclasses.replace(CONFIG, num_layers=4, moe_every=2, num_experts=4)
    load = jnp.array([[1.0, 0.5, 0.5, 0.0], [0.2, 0.8, 0.6, 0.4]])
    expected = 0.1 * np.array([[-1, 0, 0, 1], [1, -1, -1, 1]])
    router = {"router": {"kernel": jnp.ones((2, 4, 16)), "bias": jnp.zeros((2, 4))}}
    stacked = move_biases({"layers": {"block_0": {}, "block_1": {"moe": router}}}, config, load, 0.1)
    np.testing.assert_allclose(stacked["layers"]["block_1"]["moe"]["router"]["bias"], expected, atol=1e-7)
    apart = {f"layer_{layer}": {"moe": jax.tree.map(lambda leaf: leaf[0], router)} for layer in (1, 3)}
    moved = move_biases(apart, config, load, 0.1)
    for row, layer in enumerate((1, 3)):
        np.testing.assert_allclose(moved[f"layer_{layer}"]["moe"]["router"]["bias"], expected[row], atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "muon"])
def test_no_optimizer_knows_of_the_biases(optimizer):
    transformation = create_optimizer(TrainConfig(optimizer=optimizer, warmup_steps=0))
    params = jax.eval_shape(lambda: init_parameters(Transformer(CONFIG), jax.random.key(0)))
    plain = jax.eval_shape(lambda: init_parameters(Transformer(dataclasses.replace(CONFIG, router_bias=False)), jax.random.key(0)))
    assert jax.tree.structure(without_biases(params)) == jax.tree.structure(plain)
    state, expected = jax.eval_shape(transformation.init, params), jax.eval_shape(transformation.init, plain)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    updates, _ = jax.eval_shape(transformation.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_spared_bias_gets_no_update_even_with_a_gradient():
    tree = {"moe": {"router": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)}, "gate": {"bias": jnp.ones(2)}}}
    updates, _ = spare_biases(optax.sgd(1.0)).update(tree, optax.sgd(1.0).init(tree), tree)
    assert not updates["moe"]["router"]["bias"].any()
    assert (updates["moe"]["router"]["kernel"] == -1).all()
    assert (updates["moe"]["gate"]["bias"] == -1).all()  # another bias is a weight like others


def test_biases_of_zero_change_nothing_and_others_choose_other_experts(skewed):
    plain = Transformer(dataclasses.replace(CONFIG, router_bias=False))
    tokens = make_batch().tokens[:1]

    def apply(model, params):
        return APPLY(model, {"params": params}, tokens)

    without, zero = apply(plain, without_biases(skewed)), apply(Transformer(CONFIG), skewed)
    np.testing.assert_array_equal(without.logits, zero.logits)
    np.testing.assert_array_equal(without.routing.experts, zero.routing.experts)
    forced = jax.tree.map(jnp.array, skewed)
    forced["layers"]["block_0"]["moe"]["router"]["bias"] = jnp.zeros((2, 8)).at[:, 6:].set(2.0)
    chosen = apply(Transformer(CONFIG), forced).routing
    assert set(np.unique(chosen.experts)) == {6, 7}
    probabilities = jax.nn.softmax(chosen.logits, axis=-1)  # the weights are those of the probabilities alone
    expected = np.take_along_axis(np.asarray(probabilities), np.asarray(chosen.experts), axis=-1)
    np.testing.assert_allclose(chosen.weights, expected / expected.sum(-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_biases_are_saved_loaded_and_used_in_decoding(balanced, tmp_path, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), balanced[0].params)
    params["layers"]["block_0"]["moe"]["router"]["bias"] = balanced[0].params["layers"]["block_0"]["moe"]["router"]["bias"]
    config = dataclasses.replace(CONFIG, param_dtype=dtype)
    moejax.save(tmp_path / "saved", Transformer(config), {"params": params})
    model, variables, _ = moejax.load(tmp_path / "saved")
    assert model.config == config
    loaded = flatten_leaves(variables["params"])
    assert loaded[BIAS].dtype == jnp.float32
    np.testing.assert_array_equal(loaded[BIAS], flatten_leaves(params)[BIAS])
    if dtype == "float32":
        prompt = [int(token) for token in make_batch().tokens[0, :9]]
        (token,) = moejax.generate(model, variables, None, prompt, max_new_tokens=1, ignore_eos=True)
        assert token == int(np.argmax(APPLY(model, variables, np.array([prompt], np.int32)).logits[0, -1]))


def test_entropy_and_peak_of_the_experts_load():
    load = jnp.array([[0.5, 0.5, 0.5, 0.5], [2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(load_entropy(load), [1.0, 0.0, 0.5], atol=1e-6)
    np.testing.assert_allclose(load_max_over_mean(load), [1.0, 4.0, 2.0], atol=1e-6)
    nothing = jnp.zeros((1, 4))  # no token counted
    assert np.isfinite([*load_entropy(nothing), *load_max_over_mean(nothing)]).all()
    np.testing.assert_array_equal(load_entropy(jnp.ones((2, 1))), [1.0, 1.0])  # a single expert
    assert load_entropy(jnp.zeros((0, 4))).shape == load_max_over_mean(jnp.zeros((0, 4))).shape == (0,)
