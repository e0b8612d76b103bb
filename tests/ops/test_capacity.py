"""Slots: every gate that DeepSpeed itself was asked for, slot by slot; and what holds for any routing."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.capacity import assign_slots, choose_experts, expert_capacity, first_choice_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "deepspeed_gating"
TABLE = json.loads((GOLDEN / "meta.json").read_text())["table"]


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "expected.npz")


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case["prefix"] + case["kind"])
def test_the_gates_of_deepspeed(case, expected):
    def stored(name):
        return jnp.asarray(expected[case["prefix"] + name])

    kind, (rows, experts) = case["kind"], (case["tokens"], case["experts"])
    per_token = 1 if kind.startswith("top1") else 2
    capacity = case["capacity"]
    if not kind.endswith("nodrop"):
        assert expert_capacity(rows, experts, per_token, case["capacity_factor"], case["min_capacity"]) == min(capacity, rows)
    noise = stored("gumbel_noise") if kind == "top2_sampled" else None
    priority = stored("rts_uniform") if kind == "top1" else None
    chosen = choose_experts(stored("logits"), per_token, noise)
    slots = jax.jit(assign_slots, static_argnums=(1, 2))(chosen, experts, capacity, priority)
    combine = np.zeros((rows, experts * capacity + 1), np.float32)
    np.add.at(combine, (np.arange(rows)[:, None], slots.slot), slots.routing.weights)
    np.testing.assert_allclose(combine[:, :-1].reshape(rows, experts, capacity), stored("combine_weights"), atol=1e-6)
    assert combine[:, -1].sum() == 0
    np.testing.assert_allclose(first_choice_loss(stored("logits"), chosen.experts), stored("l_aux"), rtol=1e-6)
    taken = np.asarray(slots.choice)
    for slot, choice in enumerate(taken):
        if choice < rows * per_token:
            assert slots.slot.reshape(-1)[choice] == slot
    assert (taken < rows * per_token).sum() == rows * per_token - int(slots.dropped) == (np.asarray(slots.slot) < experts * capacity).sum()
