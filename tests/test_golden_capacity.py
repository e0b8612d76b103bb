"""Arctic through DeepSpeed's MoE layer: the reference implementation's numbers with slots, drops and noise, on one device."""

import dataclasses

import jax
import numpy as np
import pytest

import moejax

# What each stored variant was computed with, beside what config.json says: a factor of 1, drops, no noise.
VARIANTS = {
    "drop": {},
    "nodrop": {"drop_tokens": False},
    "bigcap": {"capacity_factor": 8.0},
    "sampled": {},  # the second expert drawn with Gumbel noise
}
NOISE = {"drop": "rts_uniform", "sampled": "gumbel_noise"}
CASES = [
    (case, variant)
    for case in ("arctic_ds_capacity", "arctic_ds_capacity_top1")
    for variant in VARIANTS
    if (case, variant) != ("arctic_ds_capacity_top1", "sampled")  # there is no second expert
]


@pytest.fixture(scope="module")
def loaded(golden):
    return {
        case: (golden(case), *moejax.load(golden(case).directory, dtype="float32")[:2])
        for case in ("arctic_ds_capacity", "arctic_ds_capacity_top1")
    }


def scatter(routing, num_experts):
    """[layers, B, T, E]: the weight with which each expert enters a token."""
    weights, experts = np.asarray(routing.weights), np.asarray(routing.experts)
    combined = np.zeros((*weights.shape[:-1], num_experts), np.float32)
    np.put_along_axis(combined, experts, weights, axis=-1)
    return combined


def cross_entropy(logits, labels):
    """Mean over the targets, which are the labels one position on; negative ones do not count."""
    logits, targets = np.asarray(logits, np.float64)[:, :-1], labels[:, 1:]
    logs = logits - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True)) - logits.max(-1, keepdims=True)
    taken = np.take_along_axis(logs, np.maximum(targets, 0)[:, :, None], axis=2)[:, :, 0]
    return float(-np.mean(taken[targets >= 0]))


def with_slots(model, variant):
    return type(model)(dataclasses.replace(model.config, dispatch="capacity", **VARIANTS[variant]))


@pytest.mark.parametrize(("case", "variant"), CASES)
def test_deepspeeds_numbers(loaded, case, variant):
    reference, model, variables = loaded[case]
    model, inputs = with_slots(model, variant), reference.inputs
    expected = {name.removeprefix(variant + "_"): value for name, value in reference.expected.items() if name.startswith(variant + "_")}
    noise = expected.get(NOISE.get(variant, ""))

    @jax.jit
    def run(variables, tokens, noise):
        return model.apply(variables, tokens, return_hidden=True, return_routing=True, router_noise=noise)

    out = run(variables, inputs["input_ids"], noise)
    assert np.max(np.abs(out.logits - expected["logits"])) < 2e-4
    assert np.max(np.abs(out.hidden[1:-1] - expected["layer_out"])) < 2e-4
    assert np.max(np.abs(out.routing.logits - expected["router_logits"])) < 2e-4
    assert np.max(np.abs(scatter(out.routing, model.config.num_experts) - expected["combine_weight"])) < 1e-5
    np.testing.assert_allclose(out.routing.first_choice_loss, expected["l_aux"], atol=1e-5)
    assert float(out.aux_loss) == pytest.approx(float(expected["aux_loss"]), abs=1e-5)
    ce = cross_entropy(out.logits, inputs["labels"])
    assert ce == pytest.approx(float(expected["loss_ce"]), abs=1e-5)
    total = ce + model.config.router_aux_loss_coefficient * float(out.aux_loss)
    assert total == pytest.approx(float(expected["loss_total"]), abs=1e-5)
    chosen = np.stack([np.bincount(layer.reshape(-1), minlength=model.config.num_experts) for layer in np.asarray(out.routing.experts)])
    assert np.array_equal(chosen, expected["exp_counts"])
    assert int(out.dropped) == np.maximum(chosen - expected["capacity"][:, None], 0).sum()
    if variant == "drop":
        assert int(out.dropped) == reference.meta["assignments_dropped"] > 0


def test_losses(loaded):
    """The head in chunks, as in training; the other variants' losses were taken from the logits above."""
    reference, model, variables = loaded["arctic_ds_capacity"]
    inputs, model = reference.inputs, with_slots(model, "drop")
    losses = moejax.loss(model, variables, inputs["input_ids"], inputs["labels"], mask=inputs["attention_mask"])
    for name, loss in (("loss_ce", losses.ce), ("aux_loss", losses.aux), ("loss_total", losses.total)):
        assert float(loss) == pytest.approx(float(reference.expected[f"drop_{name}"]), abs=1e-5), name


@pytest.mark.parametrize("case", ["arctic_ds_capacity", "arctic_ds_capacity_top1"])
def test_the_plain_path_is_what_a_loaded_model_computes(loaded, case):
    reference, model, variables = loaded[case]
    assert (model.config.dispatch, model.config.capacity_factor, model.config.drop_tokens) == ("auto", 1.0, True)
    out = jax.jit(lambda variables, tokens: model.apply(variables, tokens))(variables, reference.inputs["input_ids"])
    assert np.max(np.abs(out.logits - reference.expected["plain_logits"])) < 2e-4
    assert float(out.aux_loss) == pytest.approx(float(reference.expected["plain_aux_loss"]), abs=1e-5)
    assert int(out.dropped) == 0
