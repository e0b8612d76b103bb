"""Sampling: each option against plain numpy, exact probabilities by a chi-square test, and a row's independence from its company."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.ops.sampling import History, Sampling, filter_logits, sample_tokens

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]
OFF = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "bias": {},
}  # fmt: skip


def kept(top_k=0, top_p=1.0, min_p=0.0):
    filtered = filter_logits(LOGITS, jnp.array([top_k]), jnp.array([top_p]), jnp.array([min_p]))
    return set(np.flatnonzero(np.isfinite(np.asarray(filtered[0]))).tolist())


def test_filters_keep_the_most_likely():
    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=1) == {1}
    assert kept(top_k=3) == {1, 3, 4}
    assert kept(top_p=0.5) == {1, 3}
    assert kept(top_p=0.01) == {1}
    assert kept(top_k=2, top_p=0.99) == {1, 3}
    assert kept(top_p=0.7) == {1, 3, 4}, "0.4 + 0.25 does not reach 0.7"
    assert kept(min_p=0.3) == {1, 3, 4}, "at least 0.3 * 0.4"
    assert kept(min_p=1.0) == {1}
    assert kept(min_p=0.2, top_p=0.68) == {1, 3}, "top-p is of what min-p has left: 0.65 of 0.95 is 0.684"
    ties = filter_logits(jnp.zeros((1, 4)), jnp.array([2]), jnp.array([1.0]), jnp.array([0.0]))
    assert np.isfinite(ties[0]).tolist() == [True, True, False, False]


def make_settings(rows, vocabulary=5, bias_room=2):
    """Sampling of rows given as dicts of what is not off."""
    rows = [OFF | {"seed": 0} | row for row in rows]
    ids, values = np.full((len(rows), bias_room), vocabulary, np.int32), np.zeros((len(rows), bias_room), np.float32)
    for place, row in enumerate(rows):
        for j, (id, value) in enumerate(row["bias"].items()):
            ids[place, j], values[place, j] = id, value
    numbers = {
        name: jnp.array([row[name] for row in rows], jnp.int32 if name == "top_k" else jnp.float32) for name in OFF if name != "bias"
    }
    seeds = jnp.array([row["seed"] for row in rows], jnp.uint32)
    return Sampling(**numbers, bias_ids=jnp.asarray(ids), bias_values=jnp.asarray(values), seed=seeds)


def exact_probabilities(logits, prompt, generated, row):
    """What a row draws from, token by token in plain Python and float64."""
    row, logits = OFF | row, [float(value) for value in logits]
    for id, value in row["bias"].items():
        logits[id] += value
    for id in range(len(logits)):
        if id in prompt or id in generated:
            penalty = row["repetition_penalty"]
            logits[id] = logits[id] / penalty if logits[id] > 0 else logits[id] * penalty
        logits[id] -= row["frequency_penalty"] * generated.count(id)
        logits[id] -= row["presence_penalty"] * (id in generated)
    if row["temperature"] == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    weights = np.exp((np.array(logits) - max(logits)) / row["temperature"])
    weights[weights < row["min_p"] * weights.max()] = 0
    order = sorted(range(len(logits)), key=lambda id: (-weights[id], id))
    for id in order[row["top_k"] :] if row["top_k"] else []:
        weights[id] = 0
    weights /= weights.sum()
    reached = 0.0
    for id in order:
        if reached >= row["top_p"]:
            weights[id] = 0
        reached += weights[id]
    return weights / weights.sum()


ROWS = {
    "nothing": {},
    "temperature": {"temperature": 0.5},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.45},
    "repetition": {"repetition_penalty": 1.7},
    "frequency": {"frequency_penalty": 0.6},
    "presence": {"presence_penalty": -0.8},
    "bias": {"bias": {2: 2.5, 1: -1.0}},
    "greedy": {"temperature": 0.0},
    "greedy with a bias": {"temperature": 0.0, "bias": {2: 9.0}},
    "all of them": {
        "temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.05,
        "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "bias": {4: 0.7},
    },
}  # fmt: skip
PROMPT, GENERATED = [0, 3], [1, 1, 4]
DRAWS = 8_000


@pytest.fixture(scope="module")
def counts():
    """How often each kind of row drew each token, all kinds side by side in one batch."""
    logits = jnp.repeat(LOGITS + 1.5, len(ROWS), axis=0)  # some above 0, some below
    in_prompt = np.zeros((len(ROWS), 5), bool)
    in_prompt[:, PROMPT] = True
    generated = np.tile(np.bincount(GENERATED, minlength=5).astype(np.int32), (len(ROWS), 1))
    history = History(jnp.asarray(in_prompt), jnp.asarray(generated))
    settings = make_settings([row | {"seed": 5 + place} for place, row in enumerate(ROWS.values())])

    @jax.jit
    def draw(steps):
        return jax.lax.map(lambda step: sample_tokens(logits, settings, jnp.full(len(ROWS), step), history), steps, batch_size=500)

    tokens = np.asarray(draw(jnp.arange(DRAWS)))
    return {name: np.bincount(tokens[:, place], minlength=5) for place, name in enumerate(ROWS)}


@pytest.mark.parametrize("kind", ROWS)
def test_draws_follow_the_exact_probabilities(counts, kind):
    expected = exact_probabilities(np.log(PROBABILITIES) + 1.5, PROMPT, GENERATED, ROWS[kind]) * DRAWS
    assert np.all(counts[kind][expected == 0] == 0)
    possible = expected > 0
    chi_square = np.sum((counts[kind][possible] - expected[possible]) ** 2 / expected[possible])
    assert chi_square < 20, f"chi-square {chi_square:.1f} at {possible.sum() - 1} degrees of freedom; above 20 is under 1 in 2,000"


def test_a_row_draws_the_same_in_any_company_and_place():
    rows = [{"seed": 7 * place} | row for place, row in enumerate(ROWS.values())]
    logits = jax.random.normal(jax.random.key(3), (len(rows), 30))
    steps = jnp.arange(len(rows))
    sample = jax.jit(sample_tokens)
    together = sample(logits, make_settings(rows, 30), steps)
    turned = sample(logits[::-1], make_settings(rows[::-1], 30), steps[::-1])
    assert turned[::-1].tolist() == together.tolist()
    for row in range(len(rows)):
        alone = sample(logits[row : row + 1], make_settings(rows[row : row + 1], 30), steps[row : row + 1])
        assert int(alone[0]) == int(together[row])


def test_greedy_rows_take_the_largest_whatever_the_others_ask():
    logits = jax.random.normal(jax.random.key(4), (6, 30))
    rows = [{"temperature": 0.0, "top_k": 3, "top_p": 0.2, "min_p": 0.9} if row % 2 else {"temperature": 3.0} for row in range(6)]
    chosen = jax.jit(sample_tokens)(logits, make_settings(rows, 30), jnp.zeros(6, jnp.int32))
    assert chosen[1::2].tolist() == jnp.argmax(logits, axis=-1)[1::2].tolist()


def test_nothing_is_drawn_or_sorted_without_need():
    """Drawing and sorting stand in branches of their own."""
    settings = make_settings([{}])
    outer = jax.make_jaxpr(sample_tokens)(LOGITS, settings, jnp.zeros(1, jnp.int32)).jaxpr
    names = [equation.primitive.name for equation in outer.eqns]
    assert "sort" not in names and "random_bits" not in names and names.count("cond") == 1
    drawing = next(equation for equation in outer.eqns if equation.primitive.name == "cond").params["branches"][1]
    names = [equation.primitive.name for equation in drawing.jaxpr.eqns]
    assert "sort" not in names and names.count("cond") == 1
