"""The reference implementations' numbers, through the public names alone, in float32.

Logits and hidden states where the mask is 1; router decisions exactly; losses; gradients; greedy continuations exactly.
"""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.cache_config import CacheConfig
from moejax.generation_config import GenerationSettings
from moejax.ops.routing import load_balance_loss, router_statistics
from moejax.serving.engine import Engine
from tests.conftest import check_gradients, greedy_prompts

CASES = [
    "mixtral_hf",
    pytest.param("mixtral_hf_sharded", marks=pytest.mark.slow),  # the same kind of model, in files of another layout
    "mixtral_hf_sliding_window",
    "arctic_parallel",
    "arctic_interleaved",
    "arctic_top1",
    pytest.param("arctic_parallel_mixed", marks=pytest.mark.slow),
    pytest.param("arctic_sliding_window", marks=pytest.mark.slow),
    "arctic_sinkcache",
    "mixtral_original_safetensors",
    pytest.param("mixtral_original", marks=pytest.mark.torch),
    pytest.param("mixtral_original_release8", marks=pytest.mark.torch),
]
FOLDERS = {"mixtral_original_release8": "release8"}  # where a case keeps its weights, if not beside its numbers


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    reference = golden(request.param)
    if any(reference.directory.rglob("*.pt*")):
        pytest.importorskip("torch", reason="the torch extra is not installed")
    model, variables, tokenizer = moejax.load(reference.directory / FOLDERS.get(request.param, ""), dtype="float32")
    assert tokenizer is None
    return reference, model, variables


def largest_difference(ours, expected, real):
    return np.max(np.abs(np.asarray(ours) - expected)[..., real, :])


def test_forward_pass(case):
    reference, model, variables = case
    inputs, expected, real = reference.inputs, reference.expected, reference.inputs["attention_mask"] == 1
    run = jax.jit(lambda variables, tokens, mask: model.apply(variables, tokens, mask=mask, return_hidden=True, return_routing=True))
    out = run(variables, inputs["input_ids"], inputs["attention_mask"])
    assert out.logits.dtype == jnp.float32
    assert out.logits.shape == expected["logits"].shape
    assert out.hidden.shape == expected["hidden"].shape
    assert out.routing.logits.shape == expected["router_logits"].shape
    assert largest_difference(out.logits, expected["logits"], real) < 2e-4
    assert largest_difference(out.hidden, expected["hidden"], real) < 2e-4
    assert largest_difference(out.routing.logits, expected["router_logits"], real) < 2e-4
    assert largest_difference(out.routing.weights, expected["topk_weight"], real) < 2e-4
    assert np.array_equal(np.asarray(out.routing.experts)[:, real], expected["topk_idx"][:, real])
    if "aux_loss" in expected:  # mistral-inference has none
        assert float(out.aux_loss) == pytest.approx(float(expected["aux_loss"]), abs=1e-5)
    assert int(out.dropped) == 0


def test_losses(case):
    reference, model, variables = case
    inputs, expected = reference.inputs, reference.expected
    losses = moejax.loss(model, variables, inputs["input_ids"], inputs["labels"], mask=inputs["attention_mask"])
    assert float(losses.ce) == pytest.approx(float(expected["loss_ce"]), abs=1e-5)
    for name, loss in (("aux_loss", losses.aux), ("loss_total", losses.total)):
        if name in expected:
            assert float(loss) == pytest.approx(float(expected[name]), abs=1e-5)


@pytest.mark.slow
def test_mixtral_loss_over_all_positions(case):
    """The reference's load-balance loss without a mask, on the routers of the masked run: padding counts then."""
    reference, model, variables = case
    if "aux_loss_no_mask" not in reference.expected:
        pytest.skip("only the Mixtral references have it")
    out = model.apply(variables, reference.inputs["input_ids"], mask=reference.inputs["attention_mask"], return_routing=True)
    rows = [values.reshape(values.shape[0], -1, values.shape[-1]) for values in (out.routing.logits, out.routing.experts)]
    statistics = jax.vmap(lambda logits, experts: router_statistics(logits, experts, None))(*rows)
    assert float(load_balance_loss(statistics, "pooled")) == pytest.approx(float(reference.expected["aux_loss_no_mask"]), abs=1e-5)


def test_gradients(case):
    reference, model, variables = case
    if not reference.gradients:
        pytest.skip("the reference has no gradients for this case")
    inputs = reference.inputs

    def total(variables):
        return moejax.loss(model, variables, inputs["input_ids"], inputs["labels"], mask=inputs["attention_mask"]).total

    check_gradients(jax.grad(total)(variables), reference, model.config)


@pytest.mark.slow
def test_greedy_continuations(case):
    """All prompts in one batch of different lengths; some continuations pass an EOS, which is ignored."""
    reference, model, variables = case
    prompts = greedy_prompts(reference)
    expected = reference.expected["greedy_tokens"]
    assert moejax.generate(model, variables, None, prompts, max_new_tokens=expected.shape[1], ignore_eos=True) == expected.tolist()


@pytest.mark.slow
def test_greedy_continuations_alone(case):
    reference, model, variables = case
    expected = reference.expected["greedy_tokens"]
    for prompt, tokens in zip(greedy_prompts(reference), expected.tolist(), strict=True):
        assert moejax.generate(model, variables, None, prompt, max_new_tokens=expected.shape[1], ignore_eos=True) == tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "chunk"), [(CacheConfig(), 3), (CacheConfig("window"), 512), (CacheConfig("sinks"), 3)], ids=["chunks", "window", "sinks"]
)
def test_greedy_continuations_from_every_cache(case, cache, chunk):
    """Prompts in chunks; the caches that forget, while they need not yet: the window is the model's own, or as long as the texts."""
    reference, model, variables = case
    prompts, expected = greedy_prompts(reference), reference.expected["greedy_tokens"]
    longest = max(map(len, prompts)) + expected.shape[1]
    if cache.kind == "sinks" or (cache.kind == "window" and model.config.attention_window is None):
        cache = dataclasses.replace(cache, window=longest)
    made = Engine(model, variables, cache=cache, chunk=chunk).generate(prompts, GenerationSettings(expected.shape[1], ignore_eos=True))
    assert made == expected.tolist()
