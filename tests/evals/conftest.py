"""What tests of evaluations share: a tiny model with a tokenizer, in memory and saved."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.config import ModelConfig
from moejax.data.passkey import generate_document
from moejax.data.text import train_tokenizer
from moejax.model.transformer import Transformer, abstract_parameters

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=3, max_length=32,
    rope_theta=100.0,
)  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([generate_document(0, index) for index in range(200)], 512)


@pytest.fixture(scope="session")
def model():
    return Transformer(CONFIG)


@pytest.fixture(scope="session")
def variables():
    random = np.random.default_rng(0)
    return {"params": jax.tree.map(lambda a: jnp.asarray(random.normal(0.05, 0.3, a.shape), a.dtype), abstract_parameters(CONFIG))}


@pytest.fixture(scope="session")
def saved(model, variables, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("evals") / "saved"
    moejax.save(path, model, variables, tokenizer)
    return path
