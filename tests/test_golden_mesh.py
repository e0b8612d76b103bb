"""The reference implementations' numbers on eight devices: what test_golden.py holds one device to, within the same bounds.

Each case has a mesh that its sizes divide. One kind of dispatch is run with everything; the others forward only, as
tests/model/test_transformer_mesh.py compares gradients on every mesh.
"""

import dataclasses

import jax
import numpy as np
import pytest

import moejax
from tests.conftest import check_gradients, greedy_prompts

# case -> (mesh, the dispatch that is also trained and decoded with, those that are run forward)
CASES = {
    "mixtral_hf": ({"expert": 4, "tensor": 2}, "ragged", ("gather", "capacity")),
    "mixtral_hf_sharded": ({"expert": 4, "context": 2}, "gather", ("ragged",)),
    "mixtral_hf_sliding_window": ({"expert": 4, "data": 2}, "auto", ("ragged",)),
    "arctic_parallel": ({"expert": 8}, "ragged", ("capacity",)),
    "arctic_interleaved": ({"expert": 2, "tensor": 4}, "gather", ("ragged",)),
    "arctic_top1": ({"expert": 2, "fsdp": 4}, "auto", ("ragged", "capacity")),
    "arctic_parallel_mixed": ({"expert": 2, "context": 2, "tensor": 2}, "ragged", ("capacity",)),
    "arctic_sliding_window": ({"expert": 4, "tensor": 2}, "gather", ("ragged",)),
    "arctic_sinkcache": ({"data": 2, "fsdp": 2, "expert": 2}, "auto", ()),
    "mixtral_original_safetensors": ({"expert": 4, "data": 2}, "gather", ()),
    "arctic_ds_capacity": ({"expert": 4, "tensor": 2}, "auto", ("ragged",)),
    "arctic_ds_capacity_top1": ({"expert": 2, "tensor": 2, "fsdp": 2}, "auto", ("ragged",)),
}
FORWARD = [(case, kind) for case, (_, _, kinds) in CASES.items() for kind in kinds]


@pytest.fixture(scope="module")
def loaded(golden):
    """case -> (reference, model on its mesh, variables on it), read once."""
    kept = {}

    def load(case, kind):
        if case not in kept:
            reference = golden(case)
            mesh = moejax.make_mesh(**{"fsdp": 1} | CASES[case][0])
            kept[case] = (reference, *moejax.load(reference.directory, mesh, dtype="float32")[:2])
        reference, model, variables = kept[case]
        drops = {"drop_tokens": False} if kind == "capacity" else {}
        return reference, moejax.Transformer(dataclasses.replace(model.config, dispatch=kind, **drops), model.mesh), variables

    return load


def expected_of(reference):
    """The reference's numbers of the path that drops nothing."""
    if "plain_logits" in reference.expected:
        return {name: reference.expected["plain_" + name] for name in ("logits", "aux_loss")}
    return reference.expected


def check_forward(reference, model, variables):
    inputs, expected, real = reference.inputs, expected_of(reference), reference.inputs["attention_mask"] == 1
    run = jax.jit(lambda variables, tokens, mask: model.apply(variables, tokens, mask=mask, return_hidden=True, return_routing=True))
    out = run(variables, inputs["input_ids"], inputs["attention_mask"])
    ours = {
        "logits": out.logits, "hidden": out.hidden, "router_logits": out.routing.logits, "topk_weight": out.routing.weights,
    }  # fmt: skip
    for name, values in ours.items():
        if name in expected:
            assert np.max(np.abs(np.asarray(values) - expected[name])[..., real, :]) < 2e-4, name
    if "topk_idx" in expected:
        assert np.array_equal(np.asarray(out.routing.experts)[:, real], expected["topk_idx"][:, real])
    if "aux_loss" in expected and model.config.dispatch != "capacity":  # Arctic's slots have DeepSpeed's loss
        assert float(out.aux_loss) == pytest.approx(float(expected["aux_loss"]), abs=1e-5)
    assert int(out.dropped) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), FORWARD)
def test_forward_pass(loaded, case, kind):
    reference, model, variables = loaded(case, kind)
    check_forward(reference, model, variables)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_everything(loaded, case):
    reference, model, variables = loaded(case, CASES[case][1])
    if case == "mixtral_hf":
        assert not variables["params"]["layers"]["block_0"]["moe"]["gate"]["kernel"].is_fully_replicated
    check_forward(reference, model, variables)
    check_losses_and_gradients(reference, model, variables)
    if "greedy_tokens" in reference.expected:
        expected = reference.expected["greedy_tokens"]
        prompts = greedy_prompts(reference)
        assert moejax.generate(model, variables, None, prompts, max_new_tokens=expected.shape[1], ignore_eos=True) == expected.tolist()


def check_losses_and_gradients(reference, model, variables):
    inputs, expected = reference.inputs, reference.expected
    if "loss_ce" not in expected:
        return

    def total(variables):
        losses = moejax.loss(model, variables, inputs["input_ids"], inputs["labels"], mask=inputs["attention_mask"])
        return losses.total, losses

    if reference.gradients:
        gradients, losses = jax.grad(total, has_aux=True)(variables)
    else:
        gradients, losses = None, total(variables)[1]
    for name, loss in (("loss_ce", losses.ce), ("aux_loss", losses.aux), ("loss_total", losses.total)):
        if name in expected:
            assert float(loss) == pytest.approx(float(expected[name]), abs=1e-5), name
    if gradients is not None:
        check_gradients(gradients, reference, model.config)


@pytest.mark.slow
def test_deepspeeds_slots_on_a_mesh(golden):
    """With a slot for every row, where the slots are does not matter: the numbers are DeepSpeed's own, its loss included."""
    reference = golden("arctic_ds_capacity")
    mesh = moejax.make_mesh(fsdp=1, expert=4, tensor=2)
    model, variables, _ = moejax.load(reference.directory, mesh, dtype="float32")
    model = moejax.Transformer(dataclasses.replace(model.config, dispatch="capacity", drop_tokens=False), mesh)
    out = jax.jit(lambda variables, tokens: model.apply(variables, tokens))(variables, reference.inputs["input_ids"])
    assert np.max(np.abs(out.logits - reference.expected["nodrop_logits"])) < 2e-4
    assert float(out.aux_loss) == pytest.approx(float(reference.expected["nodrop_aux_loss"]), abs=1e-5)
