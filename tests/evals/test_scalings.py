"""Scalings as they are typed, and what becomes of the model."""

from __future__ import annotations

import dataclasses

import pytest

from moejax.config import UserError
from moejax.evals.scalings import parse_scaling, scale_model
from moejax.rope_config import RopeScaling
from tests.evals.conftest import CONFIG


def test_what_is_typed_becomes_a_scaling():
    assert parse_scaling("checkpoint") is None
    assert parse_scaling("none") == RopeScaling()
    assert parse_scaling("yarn:4") == RopeScaling("yarn", factor=4.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yarm:4", r"scalings has 'yarm:4'; expected checkpoint, none, or one of linear:FACTOR"),
        ("none:4", "scalings has 'none:4'"),
        ("linear", "scalings has 'linear'"),
        ("linear:x", "expected a number behind the colon"),
        ("linear:0.5", r"model.rope_scaling.factor=0.5 must be a number from 1 on"),
    ],
)
def test_what_is_no_scaling_is_refused(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_scaling(text)
    assert "\n" not in str(caught.value)


def test_the_original_length_is_that_of_the_scaling_else_the_one_trained_with(model):
    assert scale_model(model, None, 16) is model
    assert scale_model(model, parse_scaling("yarn:4"), 16).config.rope_scaling == RopeScaling("yarn", factor=4.0, original_length=16)
    assert scale_model(model, parse_scaling("linear:4"), 16).config == dataclasses.replace(
        CONFIG, rope_scaling=RopeScaling("linear", factor=4.0)
    )
    tuned = scale_model(model, RopeScaling("yarn", factor=4.0), 8)
    assert scale_model(tuned, parse_scaling("dynamic:2"), 64).config.rope_scaling.original_length == 8
    assert scale_model(tuned, parse_scaling("none"), 64).config == CONFIG
