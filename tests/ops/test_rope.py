"""Rotary frequencies: the limits of each kind of scaling. tests/families/test_hf_rope.py compares them with transformers."""

import numpy as np
import pytest

from moejax.ops.rope import rotary_frequencies


def frequencies(kind="none", **options):
    return rotary_frequencies(32, 10_000.0, kind=kind, **options).radians


def test_plain_frequencies_are_powers_of_theta():
    np.testing.assert_allclose(frequencies(), [10_000.0 ** (-i / 16) for i in range(16)], rtol=1e-7)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_fast_frequencies_are_kept_and_slow_ones_divided(kind):
    ours = frequencies(kind, factor=8.0, original_length=4096)
    share = ours / frequencies()
    assert share[0] == 1.0
    assert share[-1] == pytest.approx(1 / 8)
    assert np.all(np.diff(share) <= 0)


def test_dynamic_changes_nothing_up_to_the_original_length_and_stretches_with_the_length_behind_it():
    at = [frequencies("dynamic", factor=4.0, original_length=100, length=length) for length in (1, 100, 200, 300)]
    np.testing.assert_array_equal(at[0], frequencies())
    np.testing.assert_array_equal(at[1], frequencies())
    assert np.all(at[2][1:] < at[1][1:])
    assert np.all(at[3][1:] < at[2][1:])


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_factor_of_one_changes_nothing(kind):
    np.testing.assert_allclose(frequencies(kind, factor=1.0, original_length=100, length=50), frequencies(), rtol=1e-6)


def test_unknown_kinds_are_an_error():
    with pytest.raises(ValueError, match="'longrope' is unknown; expected none, linear"):
        frequencies("longrope")
