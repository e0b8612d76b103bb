"""Every measurement for a GPU, run here at tiny sizes: what needs a GPU says so in its row, and the rest has numbers."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moejax.bench.gpu_items import ITEMS, Sizes, chain, even_sizes, measure, relative_error
from moejax.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=2, dtype="bfloat16"
)
TINY = Sizes(
    experts=(("small", 2, 8, 12),), rows=(4, 16), tokens=32, length=16, heads=(2, 1, 8), decode_batches=(2,), contexts=(32,),
    models=(("small", MODEL),), remat=("full",), seconds=0.001,
)  # fmt: skip
LONG = {"check_grouped", "check_attention", "training", "moe", "grouped", "attention"}
# Ways that only a GPU has.
ON_GPU = {"jax example", "cudnn", "tokamax"}


@pytest.mark.filterwarnings("ignore:The out_shape and scratch_shapes:DeprecationWarning")  # tokamax 0.0.12 with jax 0.10
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in ITEMS])
def test_every_item_runs(name):
    rows = list(ITEMS[name](TINY))
    assert rows
    for row in rows:
        if row.get("way") in ON_GPU:
            assert "error" in row
            continue
        assert "error" not in row, row
        if name.startswith("check"):
            assert row["relative_error"] < 0.05
        else:
            assert row["microseconds"] > 0 and row["temporary_bytes"] >= 0
        if name == "training":
            assert 0 < row["fraction_of_peak"] < 2 and np.isfinite(row["loss"])


def test_rates_are_of_one_call():
    x = jnp.ones((64, 64))
    row = measure(lambda x: x @ x, x, seconds=0.001, flops=2e6, read=1e6, calls=2)
    np.testing.assert_allclose(row["tflops_per_second"] * row["microseconds"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(row["gigabytes_per_second"] * row["microseconds"], 1000.0, rtol=1e-6)


def test_a_chain_calls_every_time():
    """One matmul after another, which nothing can take out of the loop."""
    x = jnp.ones((8, 8))
    text = jax.jit(lambda x: chain(jnp.dot, x, x)).lower(x).compile().as_text()
    assert text is not None and "while" in text


def test_even_sizes_are_all_rows():
    assert even_sizes(10, 4).tolist() == [3, 3, 2, 2]


def test_an_error_that_is_no_number_stays_one():
    assert np.isnan(relative_error([jnp.array([jnp.nan, 1.0])], [jnp.ones(2)]))
    assert relative_error([jnp.array([1.5, 2.0])], [jnp.array([1.0, 2.0])]) == pytest.approx(0.25)


def test_the_models_are_cut_to_the_memory_they_are_for():
    from moejax.families.counts import count_parameters

    for name, config in Sizes().models:
        assert 12 * count_parameters(config).total < 75e9, name
