"""Losses read in chunks are those of one pass, whatever the chunk and the scaling."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moejax.evals.scalings import parse_scaling, scale_model
from moejax.evals.scoring import score_rows


@pytest.mark.parametrize("scaling", ["dynamic:2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "linear:4", "yarn:4"))])
def test_chunks_give_the_losses_of_one_pass(model, variables, scaling):
    scaled = scale_model(model, parse_scaling(scaling), 16)
    ids = np.random.default_rng(1).integers(3, 512, (2, 41), dtype=np.int32)
    tokens, targets = ids[:, :-1], ids[:, 1:]
    logits = np.asarray(jax.jit(scaled.apply)(variables, tokens).logits, np.float64)
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    for chunk in (16, 64):  # of which the last chunk is a part, and more than there is
        np.testing.assert_allclose(score_rows(scaled, variables, tokens, targets, chunk), expected, atol=2e-4)
