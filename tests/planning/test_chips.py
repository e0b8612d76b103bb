"""The table of chips: figures that hang together."""

import pytest

from moejax.planning.chips import CHIPS, GIB

# Matrix units of one jax device, and multiply-accumulate units along one side of them.
MATRIX_UNITS = {"v4": (8, 128), "v5e": (4, 128), "v5p": (8, 128), "v6e": (4, 256), "tpu7x": (4, 256)}


@pytest.mark.parametrize("name", CHIPS)
def test_the_clock_gives_the_peak(name):
    units, side = MATRIX_UNITS[name]
    assert units * side * side * 2 * CHIPS[name].clock == pytest.approx(CHIPS[name].flops_per_second, rel=0.01)


@pytest.mark.parametrize("name", CHIPS)
def test_rates_are_per_second_and_in_order(name):
    chip = CHIPS[name]
    assert chip.name == name
    assert chip.network_bytes_per_second < chip.link_bytes_per_second < chip.hbm_bytes_per_second < chip.flops_per_second
    assert chip.hbm_bytes >= 16 * GIB
    assert chip.links == (4 if chip.wraps_from == 16 else 6)  # neighbours in two dimensions, or in three


def test_only_one_chip_has_two_devices():
    assert [name for name, chip in CHIPS.items() if chip.devices_per_chip != 1] == ["tpu7x"]
