"""The step: parts add up to the whole batch, a step that is not finite leaves no trace, and every optimiser learns and resumes."""

import dataclasses
import functools
import importlib.util
import re

import jax
import numpy as np
import pytest
from jax import export
from jax import numpy as jnp

from moejax.checkpoint import store
from moejax.config import ModelConfig, TrainConfig, UserError
from moejax.data.rows import Batch
from moejax.model.transformer import Transformer, init_parameters
from moejax.training.objectives import pretrain
from moejax.training.state import abstract_state, create_optimizer, create_state, rebuild, stored_part
from moejax.training.step import StepOptions, check_finite, compute_gradients, split_rows, step_options, train_step

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=4, residual_mlp=False,
    initializer_range=0.2, router_aux_loss_coefficient=0.0, dispatch="dense",  # which compiles in a third of the time
)  # fmt: skip
MODEL = Transformer(CONFIG)
OPTIMIZER = create_optimizer(TrainConfig(steps=20, warmup_steps=2, learning_rate=0.03))
GRADIENTS = jax.jit(compute_gradients, static_argnums=(0, 3))


def make_batch(seed: int, rows: int = 4, length: int = 12) -> Batch:
    tokens = np.random.default_rng(seed).integers(3, 32, (rows, length + 1)).astype(np.int32)
    shape = (rows, length)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.float32), np.ones(shape, np.int32), positions)


def poison(batch: Batch) -> Batch:
    weights = batch.weights.copy()
    weights[1, 3] = np.nan
    return batch._replace(weights=weights)


def make_uneven_batch() -> Batch:
    """Rows of 12, 1, 0 and 6 counted targets; the third is all padding, the last one half."""
    batch = make_batch(0)
    weights, segments = batch.weights.copy(), batch.segments.copy()
    weights[1, 1:], weights[2], weights[3, 6:] = 0, 0, 0
    segments[2], segments[3, 6:] = 0, 0
    return batch._replace(weights=weights, segments=segments)


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_parameters, static_argnums=0)(MODEL, jax.random.key(0))


def take_steps(state, batches, options=StepOptions()):  # noqa: B008 - a tuple of numbers
    metrics = None
    for batch in batches:
        state, metrics = train_step(MODEL, OPTIMIZER, state, batch, options)
    return state, metrics


def assert_equal_trees(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


# -- accumulation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_of_uneven_weight_give_the_whole_batch_s_gradient(params):
    batch = make_uneven_batch()
    whole, measured = GRADIENTS(MODEL, params, batch, 1)
    in_parts, summed = GRADIENTS(MODEL, params, batch, 4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole)) > 0.05
    for expected, ours in zip(jax.tree.leaves(whole), jax.tree.leaves(in_parts), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert float(summed.losses.ce) == pytest.approx(float(measured.losses.ce), abs=1e-5)
    assert float(summed.losses.total) == pytest.approx(float(measured.losses.total), abs=1e-5)
    np.testing.assert_allclose(summed.load, measured.load, atol=1e-6)  # by tokens: the row of padding weighs nothing
    np.testing.assert_allclose(np.sum(summed.load, axis=1), 2.0, atol=1e-5)


def test_router_losses_are_means_over_the_parts(params):
    batch = make_uneven_batch()
    summed = GRADIENTS(MODEL, params, batch, 4)[1].losses
    compiled = jax.jit(functools.partial(pretrain, MODEL))
    alone = [compiled({"params": params}, jax.tree.map(lambda rows, row=row: rows[row : row + 1], batch))[0] for row in range(4)]
    assert float(summed.aux) == pytest.approx(np.mean([float(losses.aux) for losses in alone]), abs=1e-5)
    assert float(summed.z) == pytest.approx(np.mean([float(losses.z) for losses in alone]), abs=1e-5)


def test_parts_take_every_nth_row():
    """So each device of a batch laid out row by row has its share of every part."""
    batch = make_batch(0, rows=6)
    for ours, rows in zip(split_rows(batch, 2), batch, strict=True):
        np.testing.assert_array_equal(ours, np.stack([rows[0::2], rows[1::2]]))


def test_one_part_is_no_loop(params):
    def loops(function, *arguments):
        return str(jax.make_jaxpr(function)(*arguments)).count("scan[")

    batch = make_batch(0)
    plain = loops(jax.grad(lambda params: pretrain(MODEL, {"params": params}, batch)[0].total), params)
    one, two = (loops(lambda params, parts=parts: compute_gradients(MODEL, params, batch, parts), params) for parts in (1, 2))
    assert (one, two) == (plain, plain + 1)


def test_gradients_of_half_precision_weights_come_back_in_their_type(params):
    """Added up in float32 all the same: 64 parts would lose most of their digits in bfloat16."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    shapes = jax.eval_shape(functools.partial(compute_gradients, MODEL, parts=4), half, make_batch(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes[0])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes[1].losses)} == {"float32"}


# -- steps that are not finite -------------------------------------------------------------------------------------------


def test_a_poisoned_batch_is_as_if_it_had_not_been():
    clean, _ = take_steps(create_state(MODEL, OPTIMIZER, 0), [make_batch(0), make_batch(1)])
    before, _ = take_steps(create_state(MODEL, OPTIMIZER, 0), [make_batch(0)])
    skipped, metrics = take_steps(before, [poison(make_batch(7))])
    assert (int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    assert not np.isfinite(metrics["loss"])
    after, later = take_steps(skipped, [make_batch(1)])
    assert_equal_trees((after.params, after.optimizer_state), (clean.params, clean.optimizer_state))
    assert (int(after.step), int(clean.step)) == (3, 2)
    assert (int(later["skipped_steps"]), int(later["skipped_in_a_row"])) == (1, 0)
    assert int(metrics["skipped_in_a_row"]) == 1  # still there, though the state that it was counted in was given away


def test_an_infinite_parameter_moves_nothing_else():
    state, _ = take_steps(create_state(MODEL, OPTIMIZER, 0), [make_batch(0)])
    broken = state.replace(params={**state.params, "head": {"kernel": state.params["head"]["kernel"].at[3, 3].set(jnp.inf)}})
    before = jax.tree.map(np.array, (broken.params, broken.optimizer_state))
    after, metrics = take_steps(broken, [make_batch(1), make_batch(2)])
    assert_equal_trees((after.params, after.optimizer_state), before)
    assert (int(after.counters.skipped), int(after.counters.skipped_in_a_row), int(after.step)) == (2, 2, 3)
    check_finite(metrics, TrainConfig(max_nonfinite_steps=3), 3)
    with pytest.raises(UserError, match=r"steps 2 to 3, .*train\.max_nonfinite_steps=2 .*learning-rate.*checkpoint"):
        check_finite(metrics, TrainConfig(max_nonfinite_steps=2), 3)


def test_the_metrics_of_a_step():
    batch = make_uneven_batch()
    _, metrics = take_steps(create_state(MODEL, OPTIMIZER, 0), [batch])
    per_layer = {"expert_load_entropy_per_layer", "expert_load_max_over_mean"}
    assert {name: value.shape for name, value in metrics.items() if value.shape} == dict.fromkeys(per_layer, (2,))
    assert per_layer | {
        *("loss", "router_aux_loss", "router_z_loss", "grad_norm", "expert_load_entropy", "dropped_tokens"),
        *("tokens_counted", "skipped_steps", "skipped_in_a_row"),
    } == set(metrics)
    assert int(metrics["tokens_counted"]) == 12 + 1 + 0 + 6
    assert float(metrics["expert_load_entropy"]) == pytest.approx(float(np.mean(metrics["expert_load_entropy_per_layer"])))
    assert all(1 <= value <= 2 for value in metrics["expert_load_max_over_mean"])  # 4 experts, 2 a token
    assert (int(metrics["skipped_steps"]), int(metrics["dropped_tokens"])) == (0, 0)


def test_a_run_s_options_are_those_of_its_config():
    assert step_options(TrainConfig(batch_size=8, accumulation_steps=4, router_bias_rate=0.5)) == StepOptions(4, 0.5)
    assert hash(step_options(TrainConfig())) == hash(StepOptions())


# -- optimisers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.02), ("adafactor", 0.02), ("lion", 0.004), ("muon", 0.05)])
def test_every_optimizer_learns_and_resumes(tmp_path, name, rate):
    """On a repeated batch, in two parts, float32 weights under bfloat16 compute; a restored state goes on bit by bit as the one saved."""
    model = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16", num_layers=1))
    config = TrainConfig(optimizer=name, steps=40, warmup_steps=2, learning_rate=rate, adam_learning_rate=0.02, weight_decay=0.01)
    optimizer, batch, losses = create_optimizer(config), make_batch(0), []
    state = create_state(model, optimizer, 0)

    def step(state, batch=batch):
        return train_step(model, optimizer, state, batch, StepOptions(2))

    for number in range(25):
        state, metrics = step(state, poison(batch) if number == 5 else batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    store.save(tmp_path / "saved", state.params, model.config, optimizer=stored_part(state), step=25)
    target = abstract_state(model, optimizer)
    stored = store.restore_optimizer(tmp_path / "saved", stored_part(target))
    restored = rebuild(25, store.restore_params(tmp_path / "saved", model.config), stored)
    assert_equal_trees(restored, state)
    assert int(restored.counters.skipped) == 1
    assert_equal_trees(step(restored), step(state))


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed (CONTRIBUTING.md)")
@pytest.mark.filterwarnings("ignore:The out_shape and scratch_shapes:DeprecationWarning")  # tokamax 0.0.12 with jax 0.10
@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_lowered_for_hopper_in_bfloat16_the_step_is_made_of_kernels(hopper, remat):
    """Forward and backward: no grouped matmul is dense, no scores of a row by a row, no logits of all tokens. Lowered, not run."""
    config = dataclasses.replace(
        CONFIG, vocab_size=1920, hidden_size=256, intermediate_size=384, head_size=64, dispatch="sorted", dtype="bfloat16", remat=remat
    )
    model, optimizer = Transformer(config), create_optimizer(TrainConfig())
    state, batch = abstract_state(model, optimizer), make_batch(0, rows=2, length=1024)
    step = jax.jit(lambda state, batch: train_step(model, optimizer, state, batch))
    with jax.numpy_rank_promotion("allow"):  # tokamax's own
        exported = export.export(step, platforms=["cuda"], disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")])
        text = exported(state, batch).mlir_module()
    calls = re.findall(r"custom_call @([\w$]+)", text)
    # Grouped matmuls: 3 forward (recomputed: 3 more), 6 backward; attention: 1 forward, 2 backward. XLA may compute some only once.
    assert calls.count("mosaic_gpu_v2") >= 12
    assert "chlo.ragged_dot" not in text
    # Constants of the branch for other devices are still there, as shapes that nothing reads; no scores are computed.
    assert not [line for line in text.splitlines() if "1024x1024x" in line and re.search(r"stablehlo\.(dot_general|exponential)", line)]
    for rows in ("2x1024", "2048"):
        assert f"tensor<{rows}x1920x" not in text
