"""The losses against the formulas written out in numpy, and where gradients flow."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.config import ModelConfig
from moejax.data.rows import Batch, pack
from moejax.model.transformer import Transformer, init_parameters
from moejax.training.objectives import negative_log_likelihoods, pretrain

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "num_experts": 4}
CONFIGS = {
    "arctic": ModelConfig(**SIZES, initializer_range=0.3, router_aux_loss_coefficient=0.02, router_z_loss_coefficient=0.003),
    "mixtral": ModelConfig(
        **SIZES, family="mixtral", residual_mlp=False, router_aux_loss_kind="pooled", top_1_weight="one", initializer_range=0.3,
        router_aux_loss_coefficient=0.01, router_z_loss_coefficient=0.1, tie_embeddings=True,
    ),
}  # fmt: skip
PRETRAIN = jax.jit(pretrain, static_argnums=0)
PARTS = ("ce", "aux", "z")
DOCUMENTS = [[1, 5, 6, 7, 2], [1, 8, 9, 30, 31, 32, 33, 2], [1, 12, 2], [1, 20, 21, 22, 23, 24, 25, 2]]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    model = Transformer(CONFIGS[request.param])
    return model, {"params": jax.jit(init_parameters, static_argnums=0)(model, jax.random.key(0))}


@pytest.fixture(scope="module")
def batch() -> Batch:
    rows = pack(DOCUMENTS, sequence_length=8)
    return Batch(*map(np.stack, zip(*(rows[index] for index in range(len(rows))), strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def gradient_of(model, variables, batch, shares):
    """The gradient of shares[0] * ce + shares[1] * aux + shares[2] * z."""

    def combine(variables):
        losses, _ = pretrain(model, variables, batch)
        return shares @ jnp.stack([losses.ce, losses.aux, losses.z])

    return jax.grad(combine)(variables)


@pytest.fixture(scope="module")
def gradients(case, batch):
    return {part: gradient_of(*case, batch, np.eye(3, dtype=np.float32)[number])["params"] for number, part in enumerate(PARTS)}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True)) - logits.max(-1, keepdims=True)


def router_losses(outputs, config, counts):
    """The load-balance and z losses from the routers' raw decisions, [layers, B, T, ...], over the positions that count."""
    logits = np.asarray(outputs.routing.logits, np.float64)[:, counts]
    probabilities = np.exp(log_softmax(logits))
    chosen = (np.asarray(outputs.routing.experts)[:, counts][..., None] == np.arange(config.num_experts)).sum(2)
    load, probability = chosen.mean(1), probabilities.mean(1)
    if config.router_aux_loss_kind == "pooled":
        load, probability = load.mean(0), probability.mean(0)
    return config.num_experts * np.sum(load * probability), np.mean(np.log(np.exp(logits).sum(-1)) ** 2)


def test_loss_is_the_formula(case):
    model, variables = case
    config = model.config
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config.vocab_size, (3, 9)).astype(np.int32)
    mask = np.ones((3, 9), np.int32)
    mask[2, 6:] = 0
    labels = np.where(mask == 1, tokens, -100)
    labels[0, 3] = -100  # one that does not count in the midst
    losses = moejax.loss(model, variables, tokens, labels, mask=mask)
    outputs = jax.jit(functools.partial(model.apply, return_routing=True))(variables, tokens, mask=mask)
    total = [
        log_softmax(outputs.logits[row, position])[labels[row, position + 1]]
        for row in range(3)
        for position in range(8)
        if labels[row, position + 1] >= 0
    ]
    counts = mask == 1 if config.router_aux_loss_kind == "pooled" else np.ones_like(mask, bool)
    aux, z = router_losses(outputs, config, counts)
    assert float(losses.ce) == pytest.approx(-np.mean(total), abs=1e-5)
    assert float(losses.aux) == pytest.approx(aux, abs=1e-5)
    assert float(losses.z) == pytest.approx(z, abs=1e-4)
    expected = float(losses.ce) + config.router_aux_loss_coefficient * aux + config.router_z_loss_coefficient * z
    assert float(losses.total) == pytest.approx(expected, abs=1e-5)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(losses)} == {"float32"}


def test_pretraining_counts_the_targets_of_weight_1_alone(case, batch):
    model, variables = case
    losses, outputs = PRETRAIN(model, variables, batch)
    logits = jax.jit(
        lambda variables, batch: model.apply(variables, batch.tokens, positions=batch.positions, segments=batch.segments).logits
    )
    every = log_softmax(logits(variables, batch))
    of_targets = np.take_along_axis(every, batch.targets[..., None], -1)[..., 0]
    assert 0 < batch.weights.sum() < batch.weights.size
    assert float(losses.ce) == pytest.approx(-of_targets[batch.weights == 1].mean(), abs=1e-5)
    elsewhere = batch._replace(targets=np.where(batch.weights == 1, batch.targets, 39))
    assert float(PRETRAIN(model, variables, elsewhere)[0].total) == float(losses.total)
    assert outputs.logits is None


def test_evaluation_adds_up_to_the_training_loss(case, batch):
    model, variables = case
    values = np.asarray(negative_log_likelihoods(model, variables, batch))
    assert (values[batch.weights == 0] == 0).all()
    assert values.sum() / batch.weights.sum() == pytest.approx(float(PRETRAIN(model, variables, batch)[0].ce), abs=1e-5)


def test_a_document_s_losses_are_those_of_the_document_alone(case, batch):
    """The first row holds the first document and the beginning of the second."""
    model, variables = case
    packed = np.asarray(negative_log_likelihoods(model, variables, batch))[0]
    rows = pack(DOCUMENTS[:1], sequence_length=8)
    alone = np.asarray(negative_log_likelihoods(model, variables, Batch(*(array[None] for array in rows[0]))))[0]
    count = len(DOCUMENTS[0]) - 1
    np.testing.assert_allclose(packed[:count], alone[:count], atol=1e-5)


def test_rows_without_a_target_cost_nothing(case, batch):
    model, variables = case
    empty = batch._replace(weights=np.zeros_like(batch.weights))
    assert float(PRETRAIN(model, variables, empty)[0].ce) == 0
    gradient = gradient_of(model, variables, empty, np.array([1, 0, 0], np.float32))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("part", PARTS)
def test_every_loss_teaches_the_router(gradients, part):
    router = np.asarray(gradients[part]["layers"]["block_0"]["moe"]["router"]["kernel"])
    assert (np.abs(router).max(axis=(1, 2)) > 0).all()  # of both layers
    assert np.isfinite(router).all()


def test_the_router_s_losses_do_not_reach_the_head(case, gradients):
    if case[0].config.tie_embeddings:
        pytest.skip("a tied head is the embedding, which the routers do read")
    assert [part for part in PARTS if gradients[part]["head"]["kernel"].any()] == ["ce"]


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(case, batch):
    """From its bfloat16 features on, the cross-entropy has float32's digits: bfloat16 has three."""
    model, variables = case
    half = Transformer(dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16"))
    exact, _ = PRETRAIN(model, variables, batch)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    losses, outputs = PRETRAIN(half, variables, batch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(losses)} == {"float32"}
    assert float(losses.ce) == pytest.approx(float(exact.ce), rel=0.03)
    assert outputs.features.dtype == jnp.bfloat16
    params = variables["params"]
    head = params["embed"]["embedding"] if model.config.tie_embeddings else params["head"]["kernel"]
    logits = np.asarray(outputs.features, np.float64) @ np.asarray(head, np.float64).T
    of_targets = np.take_along_axis(log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    assert float(losses.ce) == pytest.approx(-of_targets[batch.weights == 1].mean(), abs=1e-5)
