"""Training on a mesh: the same steps as on one device, whatever the axes; and which process feeds which rows."""

import dataclasses

import jax
import numpy as np
import pytest

import moejax
from moejax.config import ModelConfig, TrainConfig, UserError
from moejax.data.rows import Batch
from moejax.model.transformer import Transformer
from moejax.training.placement import place_batch, rows_of_process
from moejax.training.state import abstract_state, create_optimizer, create_state
from moejax.training.step import StepOptions, train_step

MODEL = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=4, max_length=64,
    initializer_range=0.2,
)  # fmt: skip


def make_batch(step: int, rows: int = 8, length: int = 12) -> Batch:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, MODEL.vocab_size, (rows, length + 1)).astype(np.int32)
    segments = np.repeat([[1] * 5 + [2] * (length - 5)], rows, axis=0).astype(np.int32)
    positions = np.repeat(np.concatenate([np.arange(5), np.arange(length - 5)])[None], rows, axis=0).astype(np.int32)
    weights = (rng.uniform(size=(rows, length)) > 0.3).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


def train(mesh, optimizer, rows=8, parts=1, **model):
    """(state, losses) after three steps."""
    transformer = Transformer(dataclasses.replace(MODEL, **model), mesh)
    state, losses = create_state(transformer, optimizer, 0), []
    for step in range(3):
        batch = make_batch(step, rows)
        batch = batch if mesh is None else place_batch(mesh, rows, batch)
        state, metrics = train_step(transformer, optimizer, state, batch, StepOptions(parts))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.slow
def assert_same(ours, expected):
    assert ours[1] == pytest.approx(expected[1], abs=2e-5)
    for left, right in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5 * max(float(np.max(np.abs(right))), 1e-2), rtol=0)


@pytest.mark.slow
def test_three_steps_on_a_mesh_are_three_steps():
    optimizer = create_optimizer(TrainConfig(steps=10, warmup_steps=0, learning_rate=1e-3))
    mesh = moejax.make_mesh(data=2, fsdp=2, expert=2)
    ours, expected = train(mesh, optimizer), train(None, optimizer)
    assert_same(ours, expected)
    target = abstract_state(Transformer(MODEL, mesh), optimizer)
    for leaf, wanted in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    gate = ours[0].params["layers"]["block_0"]["moe"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.size == gate.size // 4  # over expert and fsdp; copies over data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_every_optimiser_steps_on_a_mesh(name):
    optimizer = create_optimizer(TrainConfig(steps=10, warmup_steps=0, learning_rate=1e-3, optimizer=name))
    assert_same(train(moejax.make_mesh(fsdp=2, expert=2, tensor=2), optimizer), train(None, optimizer))


@pytest.mark.slow
def test_parts_of_a_batch_and_rows_that_do_not_divide():
    optimizer = create_optimizer(TrainConfig(steps=10, warmup_steps=0, learning_rate=1e-3))
    mesh = moejax.make_mesh(fsdp=2, expert=2, context=2)
    coefficients = {"router_aux_loss_coefficient": 0.0}  # a mean over parts is another loss
    expected = train(None, optimizer, rows=6, **coefficients)
    assert_same(train(mesh, optimizer, rows=6, **coefficients), expected)
    assert_same(train(mesh, optimizer, rows=6, parts=3, **coefficients), expected)


def test_one_process_feeds_every_row():
    assert rows_of_process(moejax.make_mesh(), 3) == (0, 1)


def test_processes_that_cannot_share_a_batch_are_told(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert rows_of_process(moejax.make_mesh(fsdp=8), 16) == (0, 1)  # all devices of this mesh are this process's
    with pytest.raises(UserError, match=r"train.batch_size=12 .*= 8.*as 16"):
        rows_of_process(moejax.make_mesh(fsdp=8), 12)
