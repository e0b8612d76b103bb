"""The properties of design that hold for any model: every wiring of both families, random weights."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.config import ModelConfig
from moejax.model.cache import create_cache
from moejax.model.transformer import Transformer, abstract_parameters, init_parameters, unstack_layers
from moejax.training.objectives import loss

SMALL = ModelConfig(
    vocab_size=61, hidden_size=24, intermediate_size=20, num_layers=3, num_heads=4, num_kv_heads=2, num_experts=5, initializer_range=0.3
)
MIXTRAL = dataclasses.replace(SMALL, family="mixtral", residual_mlp=False, top_1_weight="one", router_aux_loss_kind="pooled")
WIRINGS = {
    "mixtral": MIXTRAL,
    "mixtral, window, one kv head, wide heads, tied": dataclasses.replace(
        MIXTRAL, attention_window=4, num_kv_heads=1, head_size=10, tie_embeddings=True
    ),
    "arctic": SMALL,
    "arctic, one expert, window": dataclasses.replace(SMALL, experts_per_token=1, attention_window=5),
    "arctic, every second layer, a layer over": dataclasses.replace(SMALL, moe_every=2, num_layers=5),
    "arctic, not parallel": dataclasses.replace(SMALL, residual_mlp=False),
    "arctic, no layer with experts": dataclasses.replace(SMALL, moe_every=4),
}


def random_variables(model):
    """Random numbers in every leaf, norms included, so that no weight can be swapped for another unnoticed."""
    random = np.random.default_rng(0)
    scale = model.config.initializer_range
    return {"params": jax.tree.map(lambda a: jnp.asarray(random.normal(0.1, scale, a.shape), a.dtype), abstract_parameters(model.config))}


# The plain wirings of both families, one expert and a window are those of the reference data, which test_golden.py compares with.
GOLDEN = ("mixtral", "arctic", "arctic, not parallel", "arctic, one expert, window")
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if name in GOLDEN else name for name in WIRINGS]


@pytest.fixture(scope="module", params=PARAMETERS)
def model_and_variables(request):
    model = Transformer(WIRINGS[request.param])
    return model, random_variables(model)


@functools.partial(jax.jit, static_argnums=0)
def total_and_gradients(model, variables, tokens):
    return jax.value_and_grad(lambda v: loss(model, v, tokens, tokens).total)(variables)


LENGTH = 12  # of every row, so that one compiled program serves many tests


def tokens_of(config, rows=2, seed=0):
    return np.random.default_rng(seed).integers(1, config.vocab_size, (rows, LENGTH), dtype=np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(model, flags, variables, tokens, options):
    return model.apply(variables, tokens, **options, **dict.fromkeys(flags, True))


def apply(model, variables, tokens, *flags, **options):
    return run(model, flags, variables, tokens, options)


def test_parameters_are_plain_arrays_of_the_declared_shapes(model_and_variables):
    model, variables = model_and_variables
    expected = abstract_parameters(model.config)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables["params"]) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
    boxed = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)), jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert all(isinstance(leaf, nn.Partitioned) for leaf in leaves), "every weight declares its logical axes"


def test_scanned_equals_unrolled(model_and_variables):
    model, variables = model_and_variables
    tokens = tokens_of(model.config)
    unrolled = Transformer(dataclasses.replace(model.config, scan_layers=False))
    apart = {"params": unstack_layers(variables["params"], model.config)}
    ours = apply(model, variables, tokens, "return_hidden", "return_routing")
    expected = apply(unrolled, apart, tokens, "return_hidden", "return_routing")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_sorted_equals_dense(model_and_variables):
    model, variables = model_and_variables
    dense = Transformer(dataclasses.replace(model.config, dispatch="dense"))
    tokens = tokens_of(model.config)

    ours, expected = total_and_gradients(model, variables, tokens), total_and_gradients(dense, variables, tokens)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.max(jnp.abs(b)))))


@pytest.mark.parametrize(
    ("name", "remat"),
    [("mixtral", "full"), ("arctic", "dots"), ("arctic, every second layer, a layer over", "full")],
)
@pytest.mark.slow
def test_recomputing_changes_no_gradient(name, remat):
    model = Transformer(WIRINGS[name])
    variables, tokens = random_variables(model), tokens_of(model.config)
    again = Transformer(dataclasses.replace(model.config, remat=remat))
    ours, expected = total_and_gradients(again, variables, tokens), total_and_gradients(model, variables, tokens)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(b)))))


def test_cached_equals_uncached(model_and_variables):
    """Rows of different lengths: a padded prompt, then one token at a time, then several at once."""
    model, variables = model_and_variables
    tokens, lengths = tokens_of(model.config), np.array([5, 3])
    whole = np.asarray(apply(model, variables, tokens).logits)
    mask = (np.arange(6)[None, :] < lengths[:, None]).astype(np.int32)
    out = apply(model, variables, np.where(mask, tokens[:, :6], 0), mask=mask, cache=create_cache(model.config, 2, 16))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out.logits[row, :length], whole[row, :length], atol=2e-5)
    for size in (1, 1, 3):
        index = np.asarray(out.cache.lengths)[:, None] + np.arange(size)[None, :]
        out = apply(model, variables, np.take_along_axis(tokens, index, axis=1), cache=out.cache)
        np.testing.assert_allclose(out.logits, np.take_along_axis(whole, index[:, :, None], axis=1), atol=2e-5)
    assert np.asarray(out.cache.lengths).tolist() == [10, 8]


def test_a_padded_row_of_a_batch_equals_the_row_alone(model_and_variables):
    model, variables = model_and_variables
    tokens, length = tokens_of(model.config), 4
    mask = (np.arange(LENGTH)[None, :] < np.array([[LENGTH], [length]])).astype(np.int32)
    together = apply(model, variables, np.where(mask, tokens, 0), mask=mask).logits
    np.testing.assert_allclose(together[0], apply(model, variables, tokens[:1]).logits[0], atol=2e-5)
    np.testing.assert_allclose(together[1, :length], apply(model, variables, tokens[1:, :length]).logits[0], atol=2e-5)


def test_packed_row_equals_its_documents_alone(model_and_variables):
    model, variables = model_and_variables
    tokens = tokens_of(model.config, rows=1)
    segments = np.array([[1] * 4 + [2] * 4 + [3] * 1 + [0] * 3], np.int32)
    positions = np.concatenate([np.arange(4), np.arange(4), np.zeros(4)]).astype(np.int32)[None]
    packed = apply(model, variables, tokens, segments=segments, positions=positions).logits
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        alone = apply(model, variables, tokens[:, start:stop]).logits
        np.testing.assert_allclose(packed[0, start:stop], alone[0], atol=2e-5)


def test_no_token_sees_a_later_one(model_and_variables):
    model, variables = model_and_variables
    tokens = tokens_of(model.config)
    changed = tokens.copy()
    changed[0, 6] = (changed[0, 6] + 1) % model.config.vocab_size
    before, after = (np.asarray(apply(model, variables, t).logits) for t in (tokens, changed))
    np.testing.assert_allclose(before[0, :6], after[0, :6], atol=1e-6)
    assert np.max(np.abs(before[0, 6:] - after[0, 6:])) > 1e-3


def test_permuted_experts_give_the_same_output(model_and_variables):
    model, variables = model_and_variables
    order = jnp.array([3, 1, 4, 0, 2])

    def permute(path, leaf):
        names = [entry.key for entry in path]
        if "moe" not in names:
            return leaf
        return jnp.take(leaf, order, axis=1 if "layers" in names else 0)

    moved = jax.tree_util.tree_map_with_path(permute, variables)
    tokens = tokens_of(model.config)
    ours, expected = apply(model, moved, tokens), apply(model, variables, tokens)
    np.testing.assert_allclose(ours.logits, expected.logits, atol=2e-5)
    np.testing.assert_allclose(ours.aux_loss, expected.aux_loss, atol=1e-5)


@pytest.mark.slow
def test_labels_below_zero_do_not_count(model_and_variables):
    model, variables = model_and_variables
    tokens = tokens_of(model.config)
    labels = np.where(np.arange(LENGTH)[None, :] < 5, tokens, -100)
    log_p = np.asarray(jax.nn.log_softmax(apply(model, variables, tokens).logits), np.float64)
    expected = -np.mean([log_p[b, t, tokens[b, t + 1]] for b in range(2) for t in range(4)])
    assert float(loss(model, variables, tokens, labels).ce) == pytest.approx(expected, abs=1e-5)
    nothing = loss(model, variables, tokens, np.full_like(tokens, -100))
    assert float(nothing.ce) == 0.0


@pytest.mark.slow
def test_bfloat16_compute_with_float32_weights_stays_close():
    model = Transformer(dataclasses.replace(SMALL, dtype="bfloat16", initializer_range=0.1))
    variables = {"params": init_parameters(model, jax.random.key(0))}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    tokens = tokens_of(SMALL)
    out = apply(model, variables, tokens)
    assert (out.features.dtype, out.logits.dtype) == (jnp.bfloat16, jnp.float32)
    full = apply(Transformer(dataclasses.replace(model.config, dtype="float32")), variables, tokens)
    assert float(jnp.max(jnp.abs(out.logits - full.logits))) < 0.1 * float(jnp.max(jnp.abs(full.logits)))
    _, gradients = total_and_gradients(model, variables, tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_a_weight_of_the_wrong_shape_is_refused_by_name():
    model = Transformer(SMALL)
    params = init_parameters(model, jax.random.key(0))
    params["layers"]["block_0"]["attention"]["query"]["kernel"] = jnp.zeros((3, 24, 25))
    with pytest.raises(Exception, match="attention/query"):
        model.apply({"params": params}, jnp.zeros((1, 2), jnp.int32))
