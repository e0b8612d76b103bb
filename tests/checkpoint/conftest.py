"""Small models of every wiring, and random parameters for them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moejax.config import ModelConfig
from moejax.families.layout import abstract_parameters

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "num_experts": 3}
MIXTRAL = {"family": "mixtral", "residual_mlp": False, "top_1_weight": "one", "router_aux_loss_kind": "pooled"}
CONFIGS = {
    "mixtral": ModelConfig(**SIZES, **MIXTRAL, num_layers=2),
    "mixtral_tied_wide_heads": ModelConfig(**SIZES, **MIXTRAL, num_layers=3, head_size=6, tie_embeddings=True),
    "arctic": ModelConfig(**SIZES, num_layers=2),
    "arctic_interleaved": ModelConfig(**SIZES, num_layers=4, moe_every=2, residual_mlp=False),
    "arctic_mixed_with_tail": ModelConfig(**SIZES, num_layers=5, moe_every=2),
}


@pytest.fixture(params=list(CONFIGS))
def config(request) -> ModelConfig:
    """Each wiring in turn."""
    return CONFIGS[request.param]


@pytest.fixture
def small_config() -> ModelConfig:
    """One small model, where the wiring does not matter."""
    return CONFIGS["arctic_mixed_with_tail"]


@pytest.fixture
def small_mixtral() -> ModelConfig:
    """One small Mixtral, which has two layouts of names."""
    return CONFIGS["mixtral"]


@pytest.fixture
def random_tree():
    """A function: config, dtype -> a tree of random numpy arrays."""

    def make(config: ModelConfig, dtype: str = "float32"):
        generator = np.random.default_rng(0)
        draw = lambda leaf: generator.standard_normal(leaf.shape, np.float32).astype(jax.numpy.dtype(dtype))  # noqa: E731
        return jax.tree.map(draw, abstract_parameters(config))

    return make


@pytest.fixture
def assert_equal_trees():
    """A function: fails unless two trees have the same paths, dtypes and bits."""

    def compare(left, right):
        assert jax.tree.structure(left) == jax.tree.structure(right)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), path
            assert a.tobytes() == b.tobytes(), path

    return compare
