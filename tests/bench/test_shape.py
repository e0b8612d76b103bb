"""The shape that figures are compared at."""

from __future__ import annotations

import dataclasses

import pytest

from moejax.bench import decode, prefill, startup, train
from moejax.bench.shape import PEER_SHAPE, hold_to_peer_shape
from moejax.config import UserError
from moejax.families.counts import count_parameters
from moejax.families.flops import count_flops


def test_the_peer_shape_is_the_one_described():
    assert count_parameters(PEER_SHAPE).total == pytest.approx(39.07e6, rel=1e-4)
    assert count_flops(PEER_SHAPE, 8, 256) == pytest.approx(0.183e12, rel=0.02)


@pytest.mark.parametrize("module", [train, decode, prefill, startup])
def test_the_defaults_are_the_peer_shape(module):
    arguments = module.Arguments(peer_shape=True)
    assert arguments.model == PEER_SHAPE
    assert hold_to_peer_shape(arguments) is arguments


@pytest.mark.parametrize(
    ("module", "changes", "flag"),
    [
        (train, {"model": dataclasses.replace(PEER_SHAPE, num_layers=2)}, "--model"),
        (train, {"batch_size": 4}, "--batch-size"),
        (startup, {"sequence_length": 128}, "--sequence-length"),
        (decode, {"new_tokens": 8}, "--new-tokens"),
        (prefill, {"model": dataclasses.replace(PEER_SHAPE, num_layers=2)}, "--model"),
    ],
)
def test_another_size_beside_it_is_refused(module, changes, flag):
    with pytest.raises(UserError, match=f"--peer-shape says what the .* is, and {flag} says otherwise"):
        module.run(module.Arguments(peer_shape=True, **changes))
